from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig

from qvl_pipeline.engine import trainer
from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.feed.steps import MicroBatch, Step
from qvl_pipeline.engine.feed.stream import Lane, StreamedFeed
from qvl_pipeline.engine.feed.stream_packing import work
from qvl_pipeline.engine.spec import StreamSpec, TrainSpec
from qvl_pipeline.errors import UserError
from tests.engine.packs import make_builder
from tests.engine.ranks import JobFailedError, run_ranks
from tests.engine.streams import OVERLONG, TokenizedFile, make_streamed, open_raw, rewritten
from tests.engine.training import changed, first_error, trained

SPEC = StreamSpec(
    samples="",
    max_steps=12,
    packs_per_step=4,
    packing=True,
    packing_strategy="best_fit",
    packing_length=128,
    packing_vit_patches=64,
    shuffle_buffer_size=64,
    weights={"a": 1.0, "b": 1.0},
    samples_per_epoch=600.0,
    filter_overlong=True,
    seed=3,
)


class TableOfSamples:
    """Facts of samples in shards of 50: a third with media, every 50th too long, every 20th without an answer."""

    num_shards = 12

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.table = [self._sample(number, int(rng.integers(4, 60))) for number in range(50 * self.num_shards)]

    @staticmethod
    def _sample(number: int, length: int) -> dict[str, Any]:
        return {
            "sample_id": str(number),
            "source": "ab"[number % 2],
            "length": 200 if number % 50 == 7 else length,
            "supervised_tokens": 0 if number % 20 == 3 else 2,
            "vit_patches": 16 if number % 3 == 0 else 0,
            "spectra": 40 if number % 7 == 0 else 0,
        }

    def sources(self, shard: int) -> tuple[int, list[str]]:
        return 50 * shard, [row["source"] for row in self.table[50 * shard :][:50]]

    def samples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [self.table[row] for row in rows]


@pytest.fixture(scope="module")
def samples() -> TableOfSamples:
    return TableOfSamples()


def run(samples: TableOfSamples, spec: StreamSpec, ranks: int = 1, per_micro_batch: int = 1) -> list[list[Step]]:
    """The steps of all ranks, which exchange in turn what each of them asks to sum."""
    feeds = [StreamedFeed(samples, spec, rank, ranks, per_micro_batch, list) for rank in range(ranks)]
    return together(feeds)


def together(feeds: Sequence[StreamedFeed], done: int = 0) -> list[list[Step]]:
    """Run feeds side by side. Their exchange is simulated: first each says what it has, then the sums are put in."""
    said: list[list[int]] = []
    for feed in feeds:
        feed._exchange = lambda values: said.append(list(values)) or list(values)
    taken: list[list[Step]] = [[] for _ in feeds]
    for steps in zip(*(feed.steps_after(done) for feed in feeds), strict=True):
        sums = [sum(values) for values in zip(*said, strict=True)]
        said.clear()
        for feed, step, mine in zip(feeds, steps, taken, strict=True):
            vision = [bool(patches) for patches in sums[3:][: len(step.micro_batches)]]  # what follows is of sounds
            micro_batches = [
                dataclasses.replace(batch, vision=flag) for batch, flag in zip(step.micro_batches, vision, strict=True)
            ]
            summed = dataclasses.replace(
                step, micro_batches=tuple(micro_batches), tokens=sums[0], supervised_tokens=sums[1]
            )
            feed.finish(summed)
            mine.append(summed)
    return taken


def rows_by_step(ranks: list[list[Step]]) -> list[list[int]]:
    return [
        sorted(row for step in steps for batch in step.micro_batches for row in batch.sample_rows)
        for steps in zip(*ranks, strict=True)
    ]


def trainable(samples: TableOfSamples) -> set[int]:
    return {number for number, row in enumerate(samples.table) if row["supervised_tokens"] and row["length"] <= 128}


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit", "balanced"])
def test_packs_keep_to_the_budgets_and_are_full(samples: TableOfSamples, strategy: str) -> None:
    (steps,) = run(samples, dataclasses.replace(SPEC, packing_strategy=strategy))
    facts = samples.table
    packs = [batch.sample_rows for step in steps for batch in step.micro_batches]
    for pack in packs:
        assert sum(facts[row]["length"] for row in pack) <= 128
        assert sum(facts[row]["vit_patches"] for row in pack) <= 64
    for step in steps:
        rows = [row for batch in step.micro_batches for row in batch.sample_rows]
        assert step.tokens == sum(facts[row]["length"] for row in rows)
        assert step.supervised_tokens == 2 * len(rows)
    fill = sum(step.tokens for step in steps) / (128 * len(packs))
    assert fill > {"best_fit": 0.97, "first_fit": 0.95, "balanced": 0.95}[strategy]


def side_by_side(samples: TableOfSamples, spec: StreamSpec, ranks: int) -> np.ndarray:
    """Work of the packs `[turns, ranks]` that ranks train on at the same time."""

    def pack_work(batch: MicroBatch) -> float:
        return sum(work(samples.table[row]) for row in batch.sample_rows)

    taken = run(samples, spec, ranks)
    return np.array([[pack_work(batch) for step in steps for batch in step.micro_batches] for steps in taken]).T


def test_balanced_packs_weigh_nearly_the_same() -> None:
    samples = TableOfSamples()
    for row in samples.table:
        row["vit_patches"] *= 25  # media are heavy: 40 tokens' worth
    spec = dataclasses.replace(SPEC, packing_length=256, packing_vit_patches=None, max_steps=50)

    def excess(strategy: str) -> float:
        turns = side_by_side(samples, dataclasses.replace(spec, packing_strategy=strategy), ranks=4)
        return turns.max(axis=1).sum() / turns.mean(axis=1).sum() - 1

    assert excess("balanced") < 0.6 * min(excess("best_fit"), excess("first_fit"))


def test_each_rank_trains_on_its_heavy_packs_first(samples: TableOfSamples) -> None:
    turns = side_by_side(samples, SPEC, ranks=2).reshape(SPEC.max_steps, 2, 2)
    assert (turns[:, 0] >= turns[:, 1]).all()
    assert (turns[:, 0] > turns[:, 1]).any()


def test_without_packing_each_pack_is_one_sample(samples: TableOfSamples) -> None:
    (steps,) = run(samples, dataclasses.replace(SPEC, packing=False))
    assert {len(batch.sample_rows) for step in steps for batch in step.micro_batches} == {1}


def test_each_pass_has_every_trainable_sample_once_and_in_another_order(samples: TableOfSamples) -> None:
    one_lane = dataclasses.replace(SPEC, packs_per_step=1, packing=False, shuffle_buffer_size=16)
    expected = trainable(samples)
    (steps,) = run(samples, dataclasses.replace(one_lane, max_steps=3 * len(expected)))
    order = [row for [row] in rows_by_step([steps])]
    # What is in the shuffle buffer at the end of a pass comes later, hence the margin of 16.
    seen = Counter(order[: 2 * len(expected)])
    assert set(seen) == expected
    assert sum(count == 2 for count in seen.values()) >= len(expected) - 16
    first, second = order[:100], order[len(expected) : len(expected) + 100]
    assert len(set(first) & set(second)) < 50


def test_the_shuffle_buffer_mixes_and_a_buffer_of_one_keeps_the_order(samples: TableOfSamples) -> None:
    one_lane = dataclasses.replace(SPEC, packs_per_step=1, packing=False, max_steps=40)
    (kept,) = run(samples, dataclasses.replace(one_lane, shuffle_buffer_size=1))
    (mixed,) = run(samples, dataclasses.replace(one_lane, shuffle_buffer_size=200))
    assert rows_by_step([kept]) == sorted(rows_by_step([kept]))
    assert rows_by_step([mixed]) != sorted(rows_by_step([mixed]))
    assert rows_by_step(run(samples, one_lane)) != rows_by_step(run(samples, dataclasses.replace(one_lane, seed=4)))


@pytest.mark.parametrize(("weight", "counts"), [(2.0, {2}), (0.5, {0, 1}), (1.0, {1})])
def test_a_weight_says_how_often_a_pass_has_a_sample(samples: TableOfSamples, weight: float, counts: set[int]) -> None:
    spec = dataclasses.replace(
        SPEC, packs_per_step=1, packing=False, shuffle_buffer_size=1, weights={"a": 1.0, "b": weight}
    )
    expected = trainable(samples)
    of_b = {row for row in expected if row % 2}
    per_pass = len(expected) - len(of_b) + round(weight * len(of_b))
    (steps,) = run(samples, dataclasses.replace(spec, max_steps=per_pass))
    seen = Counter(row for [row] in rows_by_step([steps]))
    assert sum(seen[row] for row in of_b) == pytest.approx(weight * len(of_b), abs=2)
    assert {seen[row] for row in of_b} - {0} <= counts | {1}
    assert max(seen[row] for row in of_b) == max(counts)


@pytest.mark.parametrize(("ranks", "per_micro_batch"), [(2, 1), (4, 1), (3, 2), (8, 1)])
def test_steps_are_the_same_on_any_number_of_ranks(samples: TableOfSamples, ranks: int, per_micro_batch: int) -> None:
    alone, many = run(samples, SPEC), run(samples, SPEC, ranks, per_micro_batch)
    assert rows_by_step(many) == rows_by_step(alone)
    for steps in zip(alone[0], *many, strict=True):
        assert len({(step.tokens, step.supervised_tokens) for step in steps}) == 1
        assert len({tuple(batch.vision for batch in step.micro_batches) for step in steps[1:]}) == 1


@pytest.mark.parametrize(
    ("before", "after", "strategy"),
    [(1, 1, "best_fit"), (2, 2, "best_fit"), (2, 1, "first_fit"), (1, 4, "balanced"), (1, 1, "balanced")],
)
def test_a_stream_goes_on_exactly_where_it_was(samples: TableOfSamples, before: int, after: int, strategy: str) -> None:
    spec = dataclasses.replace(SPEC, packing_strategy=strategy)
    whole = rows_by_step(run(samples, spec))
    interrupted = [StreamedFeed(samples, spec, rank, before, 1, list) for rank in range(before)]
    # Loader processes make the stream run ahead of what is trained on: that must not move its position.
    prepared = [list(itertools.islice(feed.steps_after(0), 8)) for feed in interrupted]
    for feed, steps in zip(interrupted, prepared, strict=True):
        for step in steps[:5]:
            feed.finish(step)
    saved = json.loads(json.dumps({key: value for feed in interrupted for key, value in feed.state_dict().items()}))
    resumed = [StreamedFeed(samples, spec, rank, after, 1, list) for rank in range(after)]
    for feed in resumed:
        feed.load_state_dict({key: saved[key] for key in feed.state_dict()})
    assert rows_by_step(prepared)[:5] + rows_by_step(together(resumed, done=5)) == whole
    assert "buffer" in saved["lane3"]


def test_a_pack_that_no_sample_is_for_is_an_error(samples: TableOfSamples) -> None:
    with pytest.raises(UserError, match=r"every 601th sample .* for pack 601 none is there: lower gradient_accum"):
        Lane(600, samples, dataclasses.replace(SPEC, packs_per_step=601)).next_pack()


def test_a_pack_that_has_samples_but_none_to_train_on_is_another_error(samples: TableOfSamples) -> None:
    reason = r"none can be trained on \(the last of them, '303': it has no token to train on\): lower gradient_accum"
    with pytest.raises(UserError, match=rf"every 300th sample .* for pack 4 {reason}"):
        run(samples, dataclasses.replace(SPEC, packs_per_step=300))


class TestRawSamples:
    """The samples of a real stream."""

    @pytest.fixture
    def stream(self, tmp_path: Path, tiny_folders: Callable[[str], Path], family: str) -> TrainSpec:
        spec = make_streamed(tmp_path, tiny_folders(family), family, samples=24)
        rows = pq.read_table(spec.stream.samples).to_pylist()
        rewritten(Path(spec.stream.samples), rows, group=5)
        return spec

    def test_a_stream_is_bit_for_bit_that_of_the_file_tokenised_beforehand(
        self, stream: TrainSpec, family: str, tmp_path: Path
    ) -> None:
        builder = make_builder(AutoConfig.from_pretrained(stream.model.path), family)
        file = TokenizedFile(tmp_path / "compared.arrow", shard_rows=5)
        (online,), (offline,) = (run(samples, stream.stream) for samples in (open_raw(stream), file))
        assert [step.position for step in online] == [step.position for step in offline]
        for ours, theirs in zip(online, offline, strict=True):
            for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                batch, expected = (builder.build(b.samples, vision=b.vision) for b in (mine, other))
                assert batch.sample_ids == expected.sample_ids
                for name, tensor in vars(expected).items():
                    if isinstance(tensor, torch.Tensor):
                        assert torch.equal(getattr(batch, name), tensor), name
        assert {s["kind"] for step in online for b in step.micro_batches for s in b.samples} == {
            *("text", "image", "video")
        }

    def test_a_stream_of_raw_samples_goes_on_where_it_was(self, stream: TrainSpec) -> None:
        (whole,) = run(open_raw(stream), stream.stream)
        feed, resumed = (StreamedFeed(open_raw(stream), stream.stream, 0, 1, 1, list) for _ in range(2))
        for step in itertools.islice(feed.steps_after(0), 2):
            feed.finish(step)
        resumed.load_state_dict(json.loads(json.dumps(feed.state_dict())))
        assert rows_by_step([list(resumed.steps_after(2))]) == rows_by_step([whole])[2:]

    def test_a_sample_that_is_too_long_is_named_once_or_refused(self, stream: TrainSpec) -> None:
        long = dataclasses.replace(stream.stream, max_steps=40)
        (steps,) = run(open_raw(stream), long)
        assert steps[-1].epoch > 3
        [left_out] = [bad for step in steps for bad in step.left_out]
        assert left_out.sample_id == f"source/{OVERLONG}"
        assert "do not fit into a pack (packing_length 128" in left_out.reason
        refusing = dataclasses.replace(long, filter_overlong=False)
        with pytest.raises(UserError, match=rf"'source/{OVERLONG}': its \d+ tokens .* filter_overlong: true"):
            run(open_raw(stream), refusing)

    def test_a_sample_that_cannot_be_tokenised_is_left_out_and_named(self, stream: TrainSpec) -> None:
        rows = pq.read_table(stream.stream.samples).to_pylist()
        rows[3]["messages"] = json.dumps([{"role": "user", "content": [{"type": "text", "text": "which digit?"}]}])
        rewritten(Path(stream.stream.samples), rows, group=5)
        (steps,) = run(open_raw(stream), dataclasses.replace(stream.stream, max_steps=20))
        left_out = {bad.sample_id for step in steps for bad in step.left_out}
        assert left_out == {"source/3", f"source/{OVERLONG}"}
        assert 3 not in {row for rows in rows_by_step([steps]) for row in rows}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> Iterator[TrainSpec]:
    """A stream of text, images and clips that two ranks trained on for four steps, with a checkpoint after each."""
    base = make_streamed(tmp_path_factory.mktemp("streamed"), tiny_folders("qwen3_vl"), "qwen3_vl")
    training = changed(
        base,
        Path(base.run.output_dir),
        run={"save_steps": 1, "save_total_limit": 4},
        stream={"packing": False},
        data={"dataloader_num_workers": 1},
    )
    trained(training, nproc=2)
    return training


@pytest.mark.parametrize("nproc", [2, 1])
def test_training_on_a_stream_goes_on_as_if_uninterrupted(streamed: TrainSpec, tmp_path: Path, nproc: int) -> None:
    actual = changed(streamed, tmp_path / "run", run={"save_steps": 0}, data={"dataloader_num_workers": 0})
    shutil.copytree(streamed.run.output_dir, actual.run.output_dir)
    for path in (Path(actual.run.output_dir) / "checkpoints").glob("checkpoint-*"):
        if path.name != "checkpoint-2":
            shutil.rmtree(path)
    shutil.rmtree(actual.export.output_dir)
    rows = trained(actual, nproc)
    expected = [json.loads(line) for line in (Path(streamed.run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    for key in ("tokens", "supervised_tokens", "epoch"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected])
    [left_out] = [json.loads(row) for row in (Path(actual.run.output_dir) / "skipped.jsonl").read_text().splitlines()]
    assert left_out["sample_id"] == f"source/{OVERLONG}"
    result, before = (
        json.loads((Path(training.run.output_dir) / "result.json").read_text()) for training in (actual, streamed)
    )
    assert result["resumed_from_step"] == 2
    assert (result["tokens"], result["supervised_tokens"]) == (before["tokens"], before["supervised_tokens"])


def main_hanging(spec_path: Path) -> int:
    """Rank 1 comes late to its second step, for which it never gets the samples: rank 0 waits for it even longer."""
    next_pack, calls = Lane.next_pack, itertools.count()

    def hanging(self: Lane) -> list[dict[str, Any]]:
        if next(calls) == 1:
            time.sleep(1000)
        return next_pack(self)

    if os.environ["RANK"] == "1":
        Lane.next_pack = hanging
        trainer.set_collective_timeout = lambda *_: time.sleep(1.5)  # which ends the first step
    return main(spec_path)


def test_a_rank_whose_samples_are_not_read_is_named_by_the_watchdog(streamed: TrainSpec, tmp_path: Path) -> None:
    hanging = changed(streamed, tmp_path / "run", run={"step_timeout_s": 3.0}, data={"dataloader_num_workers": 0})
    (tmp_path / "run").mkdir()
    hanging.save(tmp_path / "run" / "train_spec.json")
    with pytest.raises(JobFailedError):
        run_ranks(main_hanging, 2, tmp_path / "run" / "train_spec.json", log_dir=tmp_path / "logs")
    report = first_error(tmp_path / "run")  # rank 0 may have seen rank 1 go
    assert (report["rank"], report["step"], report["sample_ids"]) == (1, 2, [])
    assert "step 2 has taken" in report["message"]
    assert "still waits for the samples of its next step" in report["message"]
    assert "in hanging" in report["traceback"]

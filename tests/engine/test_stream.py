from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qvl_pipeline.engine.feed import Step
from qvl_pipeline.engine.spec import StreamSpec, TrainSpec
from qvl_pipeline.engine.stream import StreamedFeed
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from tests.engine.training import SCHEMA, changed, make_training, trained

SPEC = StreamSpec(
    max_steps=12,
    packs_per_step=4,
    packing=True,
    packing_strategy="best_fit",
    packing_length=128,
    packing_vit_patches=64,
    shuffle_buffer_size=64,
    weights={"a": 1.0, "b": 1.0},
    tokens_per_epoch=1000.0,
    seed=3,
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> TokenizedSamples:
    """600 samples in shards of 50: a third with media, every 20th of the eval split, every 50th too long."""
    path = tmp_path_factory.mktemp("stream") / "tokenized.arrow"
    rng = np.random.default_rng(0)
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for start in range(0, 600, 50):
            rows = [row_of(number, int(rng.integers(4, 60))) for number in range(start, start + 50)]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return TokenizedSamples(path)


def row_of(number: int, length: int) -> dict[str, Any]:
    length = 200 if number % 50 == 7 else length
    return dict.fromkeys(SCHEMA.names[:6], "") | {
        "sample_id": str(number),
        "source": "ab"[number % 2],
        "split": "eval" if number % 20 == 3 else "train",
        "input_ids": list(range(length)),
        "label_spans": [{"start": length - 2, "end": length}],
        "length": length,
        "supervised_tokens": 2,
        "vit_patches": 16 if number % 3 == 0 else 0,
        "prompt_length": length - 2,
        "media": [],
    }


def run(samples: TokenizedSamples, spec: StreamSpec, ranks: int = 1, per_micro_batch: int = 1) -> list[list[Step]]:
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
            vision = [bool(patches) for patches in sums[2:]]
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


def trainable(samples: TokenizedSamples) -> set[int]:
    table = samples.columns(["split", "length"]).to_pylist()
    return {number for number, row in enumerate(table) if row["split"] == "train" and row["length"] <= 128}


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit"])
def test_packs_keep_to_the_budgets_and_are_full(samples: TokenizedSamples, strategy: str) -> None:
    (steps,) = run(samples, dataclasses.replace(SPEC, packing_strategy=strategy))
    facts = samples.columns(["length", "vit_patches", "supervised_tokens"]).to_pylist()
    packs = [batch.sample_rows for step in steps for batch in step.micro_batches]
    for pack in packs:
        assert sum(facts[row]["length"] for row in pack) <= 128
        assert sum(facts[row]["vit_patches"] for row in pack) <= 64
    for step in steps:
        rows = [row for batch in step.micro_batches for row in batch.sample_rows]
        assert step.tokens == sum(facts[row]["length"] for row in rows)
        assert step.supervised_tokens == 2 * len(rows)
    fill = sum(step.tokens for step in steps) / (128 * len(packs))
    assert fill > {"best_fit": 0.97, "first_fit": 0.95}[strategy]


def test_without_packing_each_pack_is_one_sample(samples: TokenizedSamples) -> None:
    (steps,) = run(samples, dataclasses.replace(SPEC, packing=False))
    assert {len(batch.sample_rows) for step in steps for batch in step.micro_batches} == {1}


def test_each_pass_has_every_trainable_sample_once_and_in_another_order(samples: TokenizedSamples) -> None:
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


def test_the_shuffle_buffer_mixes_and_a_buffer_of_one_keeps_the_order(samples: TokenizedSamples) -> None:
    one_lane = dataclasses.replace(SPEC, packs_per_step=1, packing=False, max_steps=40)
    (kept,) = run(samples, dataclasses.replace(one_lane, shuffle_buffer_size=1))
    (mixed,) = run(samples, dataclasses.replace(one_lane, shuffle_buffer_size=200))
    assert rows_by_step([kept]) == sorted(rows_by_step([kept]))
    assert rows_by_step([mixed]) != sorted(rows_by_step([mixed]))
    assert rows_by_step(run(samples, one_lane)) != rows_by_step(run(samples, dataclasses.replace(one_lane, seed=4)))


@pytest.mark.parametrize(("weight", "counts"), [(2.0, {2}), (0.5, {0, 1}), (1.0, {1})])
def test_a_weight_says_how_often_a_pass_has_a_sample(
    samples: TokenizedSamples, weight: float, counts: set[int]
) -> None:
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
def test_steps_are_the_same_on_any_number_of_ranks(samples: TokenizedSamples, ranks: int, per_micro_batch: int) -> None:
    alone, many = run(samples, SPEC), run(samples, SPEC, ranks, per_micro_batch)
    assert rows_by_step(many) == rows_by_step(alone)
    for steps in zip(alone[0], *many, strict=True):
        assert len({(step.tokens, step.supervised_tokens) for step in steps}) == 1
        assert len({tuple(batch.vision for batch in step.micro_batches) for step in steps[1:]}) == 1


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 4)])
def test_a_stream_goes_on_exactly_where_it_was(samples: TokenizedSamples, before: int, after: int) -> None:
    whole = rows_by_step(run(samples, SPEC))
    interrupted = [StreamedFeed(samples, SPEC, rank, before, 1, list) for rank in range(before)]
    # Loader processes make the stream run ahead of what is trained on: that must not move its position.
    prepared = [list(itertools.islice(feed.steps_after(0), 8)) for feed in interrupted]
    for feed, steps in zip(interrupted, prepared, strict=True):
        for step in steps[:5]:
            feed.finish(step)
    saved = json.loads(json.dumps({key: value for feed in interrupted for key, value in feed.state_dict().items()}))
    resumed = [StreamedFeed(samples, SPEC, rank, after, 1, list) for rank in range(after)]
    for feed in resumed:
        feed.load_state_dict({key: saved[key] for key in feed.state_dict()})
    assert rows_by_step(prepared)[:5] + rows_by_step(together(resumed, done=5)) == whole
    assert "buffer" in saved["lane3"]


def test_fewer_samples_than_packs_per_step_is_an_error(samples: TokenizedSamples) -> None:
    with pytest.raises(ValueError, match=r"no sample for pack .* lower gradient_accumulation_steps"):
        run(samples, dataclasses.replace(SPEC, packs_per_step=601))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> Iterator[TrainSpec]:
    """A stream of text, images and clips that two ranks trained on for four steps, with a checkpoint after each."""
    base = make_training(tmp_path_factory.mktemp("streamed"), tiny_folders("qwen3_vl"), "qwen3_vl", packs_per_step=2)
    training = changed(
        base,
        Path(base.run.output_dir),
        run={"save_steps": 1, "save_total_limit": 4},
        stream={"max_steps": 4, "packing": False},
        data={"pack_plan": "/nonexistent", "num_workers": 1},
    )
    trained(training, nproc=2)
    return training


@pytest.mark.parametrize("nproc", [2, 1])
def test_training_on_a_stream_goes_on_as_if_uninterrupted(streamed: TrainSpec, tmp_path: Path, nproc: int) -> None:
    actual = changed(streamed, tmp_path / "run", run={"save_steps": 0}, data={"num_workers": 0})
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
    result, before = (
        json.loads((Path(training.run.output_dir) / "result.json").read_text()) for training in (actual, streamed)
    )
    assert result["resumed_from_step"] == 2
    assert (result["tokens"], result["supervised_tokens"]) == (before["tokens"], before["supervised_tokens"])

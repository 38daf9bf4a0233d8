from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoConfig

from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.feed.batch_loader import BadSampleError, LoaderDiedError, LoaderOptions, load_batches
from qvl_pipeline.engine.feed.steps import MicroBatch
from qvl_pipeline.engine.parallel.sequence_parallel import SequenceShare, temporal_patches
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.errors import UserError
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.loading import PatchLoader
from tests.engine.ranks import JobFailedError
from tests.engine.training import changed, first_error, make_training, trained

PATCH_BYTES = 3 * 2 * 16**2


class Loader:
    """Stands in for the patch loader: blank patches, or what a broken file or a full memory do."""

    def __init__(self, patch_values: int, fails: str = "", kills: str = "", log: str = "") -> None:
        self.patch_values, self.fails, self.kills, self.log = patch_values, fails, kills, log

    def load(self, media: Sequence[dict[str, Any]]) -> torch.Tensor:
        patches = sum(temporal_patches(item) * item["grid_h"] * item["grid_w"] for item in media)
        if self.log:
            with Path(self.log).open("a") as log:
                log.write(f"{patches}\n")
        for item in media:
            if self.kills and item["key"].endswith(self.kills):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fails and item["key"].endswith(self.fails):
                raise UserError(f"image '{item['key']}' cannot be read")
        return torch.zeros(patches, self.patch_values, dtype=torch.uint8)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    return make_training(tmp_path_factory.mktemp("loader"), tiny_folders("qwen3_vl"), "qwen3_vl")


def builder(training: TrainSpec, **behaviour: str) -> BatchBuilder:
    config = AutoConfig.from_pretrained(training.model.path)
    return BatchBuilder(
        loader=Loader(PATCH_BYTES, **behaviour),
        patch_values=PATCH_BYTES,
        placeholder_ids=(config.image_token_id, config.video_token_id),
        tokens_per_second=None,
        vision_inputs=partial(FAMILIES["qwen3_vl"].vision_inputs, config.vision_config),
        sources=("a", "b"),
    )


def options(**changes: Any) -> LoaderOptions:
    defaults = {"num_workers": 1, "prefetch_factor": 2, "pin_memory": False, "skip_bad_samples": False}
    return LoaderOptions(**defaults | changes)


MICRO_BATCHES = [MicroBatch(rows, True, patches=16) for rows in ((0, 1, 3), (3, 4), (4,))]
# A process loads it alone, or, of so few bytes, in two pieces.
LOADED = [{"num_workers": 0}, {"num_workers": 1}, {"num_workers": 1, "piece_bytes": 8 * PATCH_BYTES}]


def load(
    training: TrainSpec, micro_batches: Sequence[MicroBatch], options: LoaderOptions, **behaviour: str
) -> list[Batch]:
    return list(load_batches(micro_batches, Path(training.data.tokenized), builder(training, **behaviour), options))


@pytest.mark.parametrize("loaded", LOADED)
def test_a_bad_sample_is_named_with_its_file(training: TrainSpec, loaded: dict[str, int]) -> None:
    with pytest.raises(BadSampleError, match=r"^sample 'b/1': image '.*/1.png' cannot be read") as caught:
        load(training, MICRO_BATCHES, options(**loaded), fails="/1.png")
    assert caught.value.sample_ids == ["b/1"]


@pytest.mark.parametrize("loaded", LOADED)
def test_a_skipped_sample_leaves_the_others_of_its_pack(training: TrainSpec, loaded: dict[str, int]) -> None:
    found = load(training, MICRO_BATCHES, options(**loaded, skip_bad_samples=True), fails="/4.png")
    assert [batch.sample_ids for batch in found] == [["a/0", "b/1", "b/3"], ["b/3"], ["<empty>"]]
    assert [[bad.sample_id for bad in batch.skipped] for batch in found] == [[], ["a/4"], ["a/4"]]
    # The only image of the micro-batch is gone, but some rank has media in it: the tower is called all the same.
    assert [len(batch.patches) for batch in found] == [16, 4, 4]
    assert found[1].skipped[0].supervised_tokens == 2 + 4 % 5


def test_a_killed_loader_process_is_reported_with_the_samples_it_was_preparing(training: TrainSpec) -> None:
    with pytest.raises(
        LoaderDiedError,
        match=r"a loader process died .*(Killed|exited unexpectedly).* b/3, a/4.*dataloader_num_workers",
    ) as caught:
        load(training, [MicroBatch((3, 4), True)], options(), kills="/4.png")
    assert caught.value.sample_ids == ["b/3", "a/4"]


def test_batches_are_prepared_as_far_ahead_as_asked_and_no_further(training: TrainSpec) -> None:
    asked: list[int] = []

    def micro_batches():
        for row in (0, 3, 6, 9) * 4:
            asked.append(row)
            yield MicroBatch((row,), False)

    batches = load_batches(
        micro_batches(), Path(training.data.tokenized), builder(training), options(num_workers=2, prefetch_factor=3)
    )
    next(batches)
    assert len(asked) == 2 * 3 + 1


@pytest.mark.parametrize("share", [SequenceShare(), SequenceShare(1, 2)])
def test_pieces_of_a_micro_batch_make_the_same_batch(training: TrainSpec, share: SequenceShare) -> None:
    # Images and clips, as much in all as seven images; one that is light, and one without pixels.
    heavy = MicroBatch((1, 2, 5, 8), True, patches=7 * 16)
    micro_batches = [heavy, MicroBatch((4,), True, patches=16), MicroBatch((0, 3), False), heavy]
    loader = PatchLoader(patch_size=16, frame_store=Path(training.data.video_frames))
    made = dataclasses.replace(builder(training), loader=loader, share=share)
    tokenized = Path(training.data.tokenized)
    expected = list(load_batches(micro_batches, tokenized, made, options(num_workers=0)))
    pieces = options(num_workers=2, piece_bytes=16 * PATCH_BYTES)
    for found, whole in zip(load_batches(micro_batches, tokenized, made, pieces), expected, strict=True):
        assert found.sample_ids == whole.sample_ids
        values = [{name: value for name, value in vars(b).items() if name != "sample_ids"} for b in (found, whole)]
        torch.testing.assert_close(*values, rtol=0, atol=0)


def test_what_is_prepared_ahead_is_bounded_by_bytes_however_long_a_clip(training: TrainSpec, tmp_path: Path) -> None:
    log, slots = tmp_path / "log", 2 * 2
    # As long as 32 pictures; two of them are among what is prepared ahead.
    long = MicroBatch((2, 5) * 8, True, patches=32 * 16)
    light = MicroBatch((1,), True, patches=16)
    asked = options(num_workers=2, prefetch_factor=2, piece_bytes=16 * PATCH_BYTES)
    made = builder(training, log=str(log))
    assert 2 * asked.items_ahead(made) == slots
    batches = load_batches([light, long, light, long, light], Path(training.data.tokenized), made, asked)

    def loaded(pieces: int) -> list[int]:
        deadline = time.monotonic() + 60
        while len(lines := log.read_text().split()) < pieces and time.monotonic() < deadline:
            time.sleep(0.01)
        return [int(line) for line in lines]

    taken = 0
    for micro_batch in (light, long, light):
        assert len(next(batches).patches) == micro_batch.patches
        taken += micro_batch.patches // 16
        # So many items have been asked for by now, and no more will be before the next batch is.
        ahead = loaded(taken + slots)
        assert len(ahead) == taken + slots
        assert max(ahead) == 16


def test_the_heaviest_micro_batch_is_prepared_ahead_as_a_whole(training: TrainSpec) -> None:
    made = builder(training)
    data = changed(training, Path("run"), data={"packing_length": 256 * 1024, "dataloader_num_workers": 4}).data
    heavy = LoaderOptions.from_spec(data, cuda=False)
    # 256K tokens of four patches are 1.5 GiB of pixels, in pieces of 128 MiB.
    assert (heavy.pieces_of(heavy.most_patches, made), heavy.items_ahead(made)) == (12, 4)
    shared = dataclasses.replace(made, share=SequenceShare(0, 4))
    assert (heavy.pieces_of(heavy.most_patches, shared), heavy.items_ahead(shared)) == (3, 2)
    assert dataclasses.replace(heavy, most_patches=0).items_ahead(made) == 2
    alone = dataclasses.replace(heavy, num_workers=0)
    assert (alone.pieces_of(heavy.most_patches, made), alone.items_ahead(made)) == (1, None)


def broken(training: TrainSpec, folder: Path, tiny: Path, numbers: Sequence[int]) -> TrainSpec:
    """The same training, with broken images in its own folder."""
    made = make_training(folder, tiny, "qwen3_vl")
    for number in numbers:
        (folder / f"{number}.png").write_bytes(b"no longer an image")
    return changed(made, Path(made.run.output_dir), data={"on_bad_sample": "skip"})


def test_training_without_the_skipped_samples_is_exact(
    training: TrainSpec, tmp_path: Path, tiny_folders: Callable[[str], Path]
) -> None:
    # Sample 4 is alone in its micro-batch and its only image, on whichever rank has it.
    actual = broken(training, tmp_path / "broken", tiny_folders("qwen3_vl"), [1, 4])
    rows = trained(actual, nproc=2)
    assert [row["skipped_samples"] for row in rows] == [1, 1, 0]
    lines = (Path(actual.run.output_dir) / "skipped.jsonl").read_text().splitlines()
    assert [(row["step"], row["sample_id"]) for row in map(json.loads, lines)] == [(1, "b/1"), (2, "a/4")]
    assert "4.png" in lines[1]
    assert json.loads((Path(actual.run.output_dir) / "result.json").read_text())["skipped_samples"] == 2
    expected = trained(without(training, tmp_path / "without", tiny_folders("qwen3_vl"), [1, 4]), nproc=1)
    for key in ("loss", "grad_norm", "supervised_tokens"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-4)


def test_a_step_of_which_every_sample_was_skipped_has_no_loss(
    training: TrainSpec, tmp_path: Path, tiny_folders: Callable[[str], Path]
) -> None:
    made = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", ("image", "image", "text", "text"), 2)
    for number in (0, 1):
        (tmp_path / f"{number}.png").write_bytes(b"no longer an image")
    made = changed(made, tmp_path / "run", data={"on_bad_sample": "skip"})
    skipped, other = trained(made, nproc=2)
    assert (skipped["loss"], skipped["supervised_tokens"], skipped["skipped_samples"]) == (None, 0, 2)
    assert (skipped["grad_norm"], skipped["loss_by_source"]) == (0.0, {})
    assert other["loss"] > 0


def without(training: TrainSpec, folder: Path, tiny: Path, numbers: Sequence[int]) -> TrainSpec:
    """The same training by a plan that never had these samples."""
    made = make_training(folder, tiny, "qwen3_vl")
    plan = pd.read_parquet(made.data.pack_plan)
    plan = plan[[rows[0] not in numbers for rows in plan["sample_rows"]]]
    plan.to_parquet(made.data.pack_plan, index=False)
    return made


def test_a_bad_sample_ends_the_run_by_default(
    training: TrainSpec, tmp_path: Path, tiny_folders: Callable[[str], Path]
) -> None:
    bad = broken(training, tmp_path / "broken", tiny_folders("qwen3_vl"), [4])
    bad = changed(bad, Path(bad.run.output_dir), data={"on_bad_sample": "raise"})
    with pytest.raises(JobFailedError):
        trained(bad, nproc=1)
    report = first_error(Path(bad.run.output_dir))
    assert (report["step"], report["sample_ids"]) == (2, ["a/4"])
    assert report["message"].startswith("sample 'a/4': image '")


LEAVES_A_LOADER = """
import sys

from torch.utils.data import DataLoader

from qvl_pipeline.engine.signals import start_loader

batches = iter(DataLoader(list(range(100)), num_workers=1, worker_init_fn=start_loader))
sys.modules["kept alive until the end"] = batches
print(next(batches).item())
"""


def test_a_process_that_leaves_its_loaders_to_python_ends_all_the_same() -> None:
    # Python asks them to stop, by the signal that they ignore, and waits for them.
    done = subprocess.run([sys.executable, "-c", LEAVES_A_LOADER], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_read_the_same_micro_batches_ahead_however_heavy_their_own_are(training: TrainSpec, workers: int) -> None:
    """A stream exchanges facts at each step that is read: who reads fewer of them keeps the others waiting."""

    def read_by(patches: int) -> list[int]:
        read: list[int] = []

        def micro_batches() -> Iterator[MicroBatch]:
            for number in range(9):
                read.append(number)
                yield MicroBatch((0,), True, patches=patches)

        chosen = options(num_workers=workers, most_patches=40, piece_bytes=8 * PATCH_BYTES)
        built = load_batches(micro_batches(), Path(training.data.tokenized), builder(training), chosen)
        return [len(read) for _ in built]

    assert read_by(4) == read_by(40)

"""How many loader processes are said to be enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvl_pipeline.engine.feed import loader_processes
from qvl_pipeline.engine.feed.loader_processes import HEADROOM, measured, processes_needed, spread
from qvl_pipeline.engine.feed.steps import MicroBatch, SharedSteps, read_plan
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.training import changed, make_training, trained


@pytest.fixture
def training(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    return make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl")


class Slow:
    """A builder that takes three seconds a sample by a clock of its own, and cannot load the samples of `a/8`."""

    now = 0.0

    def build(self, rows: list[dict[str, Any]], *, vision: bool, sound: bool) -> SimpleNamespace:
        self.now += 3.0 * len(rows)
        if any(row["sample_id"] == "a/8" for row in rows):
            raise OSError("no picture")
        return SimpleNamespace(samples=len(rows))


def test_batches_of_the_plan_are_loaded_to_know_what_they_take(
    training: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = SharedSteps(read_plan(Path(training.data.pack_plan)), rank=0, world_size=1, packs_per_micro_batch=1)
    assert [micro_batch.sample_rows for micro_batch in spread(steps)] == [(0,), (4,), (8,)]  # there are three steps
    slow = Slow()
    monkeypatch.setattr(loader_processes.time, "perf_counter", lambda: slow.now)
    seconds, batches = measured(spread(steps), Path(training.data.tokenized), slow)
    assert (seconds, len(batches)) == (6.0, 2)
    assert measured([MicroBatch((8,), vision=True)], Path(training.data.tokenized), slow) == (0.0, [])


@pytest.mark.parametrize(
    ("cores", "number", "said"), [(16, 8, "8: a batch"), (6, 6, "takes 8, but a rank has 6 cores")]
)
def test_enough_to_load_as_fast_as_the_device_can_train(cores: int, number: int, said: str) -> None:
    # 12 TFLOP a batch at half of 24 TFLOP/s: a second to train on, six to load.
    flops = SimpleNamespace(count=lambda batch: 12e12)
    found, why = processes_needed(12.0, [SimpleNamespace()] * 2, flops, 24e12, cores)
    assert (found, HEADROOM) == (number, 1.25)
    assert said in why


def test_auto_on_a_device_of_unknown_speed_is_one_and_trains(training: TrainSpec, tmp_path: Path) -> None:
    auto = changed(training, tmp_path / "auto", data={"dataloader_num_workers": "auto"})
    assert len(trained(auto, nproc=1)) == 3
    assert json.loads((tmp_path / "auto" / "result.json").read_text())["dataloader_num_workers"] == 1

"""Rows of metrics: what they say, and that no host waits for its device to have them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.parallel.fetching import OnItsWay
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained
from tests.engine.waits import DeviceWaits


@pytest.fixture
def training(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    return make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl")


def test_row_of_two_ranks_adds_up(training: TrainSpec) -> None:
    rows = trained(training, nproc=2)
    lengths = [sample["length"] for sample in _samples(training)]
    for row, start in zip(rows, (0, 4, 8), strict=True):
        assert row["tokens"] == sum(lengths[start : start + 4])
        assert row["pack_fill"] == pytest.approx(row["tokens"] / (4 * training.data.packing_length))
        assert row["supervised_share"] == pytest.approx(row["supervised_tokens"] / row["tokens"])
        assert row["tokens_per_second"] == pytest.approx(2 * row["tokens_per_second_per_rank"])
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_time_s"])
        assert row["fastest_step_time_s"] <= row["slowest_step_time_s"] == row["step_time_s"]
        assert {row["fastest_rank"], row["slowest_rank"]} <= {0, 1}
        assert 1 < row["work_imbalance"] < 2
        assert 0 < row["data_wait_share"] < 1
        assert row["tflops_per_rank"] > 0
        assert row["mfu"] is None


def test_work_is_that_of_the_samples_on_any_number_of_ranks(training: TrainSpec, tmp_path: Path) -> None:
    one, two = (trained(changed(training, tmp_path / str(n)), nproc=n) for n in (1, 2))
    flops = [[row["tflops_per_rank"] * row["step_time_s"] * n for row in rows] for n, rows in ((1, one), (2, two))]
    assert flops[0] == pytest.approx(flops[1])


def test_a_row_every_step_is_fetched_a_step_late_and_nothing_else_is_waited_for(
    training: TrainSpec, tmp_path: Path
) -> None:
    Path(training.run.output_dir).mkdir(parents=True)
    training.save(tmp_path / "spec.json")
    run_ranks(_record_waits, 1, tmp_path / "spec.json", tmp_path / "waits.json", log_dir=tmp_path / "logs")
    waits = json.loads((tmp_path / "waits.json").read_text())
    fetches = [[step, what] for step, what in waits if what.endswith(".arrived")]
    assert [wait for wait in waits if wait not in fetches] == []
    # The losses of the rows of steps 1, 2 and 3: the last is fetched at once, as nothing comes after it.
    assert [step for step, what in fetches if what == "ClosedWindow.arrived"] == [2, 3, 3]


def _record_waits(spec_path: Path, result: Path) -> int:
    """Train while noting, with the step, whatever would make a host wait for its GPU."""
    found: list[tuple[int, str]] = []
    trainers: list[Trainer] = []
    to, arrived = Batch.to, OnItsWay.arrived

    class Noting(DeviceWaits):
        def note(self, operation: object) -> None:
            before = len(self.found)
            super().note(operation)
            found.extend((trainers[0].step, what) for what in self.found[before:])

    # What a CPU asks of the bounds of samples, and hosts of each other.
    waits = Noting(ignored=["by_length", "all_gather_object"])

    def copied(batch: Batch, device: torch.device) -> Batch:
        batch = to(batch, device)
        waits.put(tensor for tensor in tree_leaves(vars(batch) | {"grid_thw": None}) if torch.is_tensor(tensor))
        return batch

    def fetched(values: OnItsWay) -> torch.Tensor:
        caller = sys._getframe(1)
        found.append((trainers[0].step, f"{type(caller.f_locals.get('self')).__name__}.arrived"))
        host = arrived(values)
        waits.take(host)
        return host

    class Watched(Trainer):
        def _train(self, *args: Any) -> None:
            trainers.append(self)
            with waits:
                waits.put([*self.model.parameters(), *self.model.buffers(), self.finite._first])
                super()._train(*args)

    with (
        mock.patch.object(Batch, "to", copied),
        mock.patch.object(OnItsWay, "arrived", fetched),
        mock.patch.object(engine, "Trainer", Watched),
    ):
        status = engine.main(spec_path)
    result.write_text(json.dumps(found))
    return status


def _samples(training: TrainSpec) -> list[dict[str, Any]]:
    from qvl_pipeline.media.arrow_rows import TokenizedSamples

    samples = TokenizedSamples(Path(training.data.tokenized))
    return [samples.row(number) for number in range(len(samples))]

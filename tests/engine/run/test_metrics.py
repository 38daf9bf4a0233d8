"""Rows of metrics: what they say, and that nothing waits for the device between them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained

# What makes the host wait for a device tensor.
SYNCS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
# Modules that ask tensors in host memory: kernels of the CPU, batches before they are copied to the device, what hosts
# tell each other.
ON_THE_HOST = {"attention_kernels.py", "batch.py", "checkpoints.py", "flops.py"}


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


def test_nothing_waits_for_the_device_between_rows(training: TrainSpec, tmp_path: Path) -> None:
    spec = changed(training, tmp_path / "run", run={"logging_steps": 3})
    Path(spec.run.output_dir).mkdir(parents=True)
    spec.save(tmp_path / "spec.json")
    run_ranks(_record_syncs, 1, tmp_path / "spec.json", tmp_path / "syncs.json", log_dir=tmp_path / "logs")
    found = json.loads((tmp_path / "syncs.json").read_text())
    assert [sync for sync in found if sync["step"] in (1, 2)] == []
    assert any(sync["step"] == 3 for sync in found)  # the row itself: the recorder does see them


def _record_syncs(spec_path: Path, result: Path) -> int:
    """Train while noting every line of the engine that makes the host wait, by step."""
    found: list[dict[str, Any]] = []
    trainers: list[Trainer] = []

    class Watched(Trainer):
        def __init__(self, *args: Any) -> None:
            trainers.append(self)
            super().__init__(*args)

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            if caller.parent.name == "engine" and caller.name not in ON_THE_HOST:
                found.append(
                    {"step": trainers[0].step, "call": name, "line": f"{caller.name}:{sys._getframe(1).f_lineno}"}
                )
            return original(tensor, *args, **kwargs)

        return call

    engine.Trainer = Watched
    for name in SYNCS:
        setattr(torch.Tensor, name, watched(name))
    status = engine.main(spec_path)
    result.write_text(json.dumps(found))
    return status


def _samples(training: TrainSpec) -> list[dict[str, Any]]:
    from qvl_pipeline.media.arrow_rows import TokenizedSamples

    samples = TokenizedSamples(Path(training.data.tokenized))
    return [samples.row(number) for number in range(len(samples))]

"""Float16: the rules of the loss scale, and a whole training in which steps overflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvl_pipeline.engine.__main__ import main
from qvl_pipeline.engine.optim import loss_scale
from qvl_pipeline.engine.optim.loss_scale import LossScale
from qvl_pipeline.engine.run.metrics import read_rows
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained

FINE, OVERFLOW = torch.tensor(1.0), torch.tensor(float("inf"))


def test_overflow_halves_and_skips_and_2000_clean_steps_double() -> None:
    scale = LossScale()
    assert not scale.accepts(OVERFLOW)
    assert not scale.accepts(torch.tensor(float("nan")))
    assert scale.row() == {"loss_scale": 2.0**14, "skipped_steps": 2}
    assert all(scale.accepts(FINE) for _ in range(1999))
    assert scale.value == 2.0**14
    assert scale.accepts(FINE)
    assert scale.value == 2.0**15


def test_same_scales_as_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_GROWTH_INTERVAL", 3)
    pattern = [FINE] * 4 + [OVERFLOW] + [FINE] * 7 + [OVERFLOW] * 2 + [FINE] * 2
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    reference = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    reference.scale(torch.zeros(1))
    ours = LossScale()
    for norm in pattern:
        parameter.grad = norm.clone()[None]
        reference.step(optimizer)
        reference.update()
        ours.accepts(norm)
        assert ours.value == reference.get_scale()


def test_gradient_that_is_not_finite_by_itself_is_let_through_in_the_end() -> None:
    scale = LossScale()
    assert [scale.accepts(OVERFLOW) for _ in range(17)] == [False] * 16 + [True]


def test_unscaling_restores_the_gradient() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    scale = LossScale()
    ((parameter**2).sum() * scale.value).backward()
    scale.unscale([parameter, torch.nn.Parameter(torch.zeros(3))])
    assert torch.equal(parameter.grad, torch.tensor([2.0, 4.0]))


def test_state_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_GROWTH_INTERVAL", 3)
    first, second = LossScale(), LossScale()
    for norm in (OVERFLOW, FINE, FINE):
        first.accepts(norm)
    second.load_state_dict(first.state_dict())
    assert second.row() == first.row()
    second.accepts(FINE)
    assert second.value == 2.0**16


def train_from_scale(initial: float, spec_path: Path) -> int:
    loss_scale._INITIAL = initial
    return main(spec_path)


def trained_from_scale(initial: float, spec: TrainSpec) -> list[dict]:
    folder = Path(spec.run.output_dir)
    folder.mkdir()
    spec.save(folder / "train_spec.json")
    run_ranks(train_from_scale, 2, initial, folder / "train_spec.json", log_dir=folder / "logs")
    return read_rows(folder / "metrics.jsonl")


@pytest.fixture
def training(tiny_folders: Callable[[str], Path], tmp_path: Path) -> TrainSpec:
    kinds = ("text", "image") * 4
    base = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=kinds, packs_per_step=2)
    return changed(base, tmp_path / "fp32", optim={"learning_rate": 1e-3})


def test_float16_follows_float32(training: TrainSpec, tmp_path: Path) -> None:
    expected = trained(training, nproc=2)
    rows = trained_from_scale(2.0**10, changed(training, tmp_path / "fp16", parallel={"fp16": True}))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=5e-3)
    assert [row["loss"] for row in rows] != [row["loss"] for row in expected]
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in expected], rel=2e-2)
    assert (rows[-1]["loss_scale"], rows[-1]["skipped_steps"]) == (2.0**10, 0)


def test_steps_that_overflow_are_not_taken_and_are_counted(training: TrainSpec, tmp_path: Path) -> None:
    spec = changed(training, tmp_path / "fp16", parallel={"fp16": True}, run={"save_steps": 1})
    rows = trained_from_scale(2.0**60, spec)
    assert [row["grad_norm"] for row in rows] == [None] * 4
    assert [row["skipped_steps"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss_scale"] == 2.0**56
    base = load_file(Path(spec.model.path) / "model.safetensors")
    exported = load_file(Path(spec.export.output_dir) / "model.safetensors")
    assert all(torch.equal(weight, base[name]) for name, weight in exported.items())
    # A resumed run goes on with the scale of its checkpoint, not from 65,536.
    (tmp_path / "fp16" / "checkpoints" / "checkpoint-4" / "COMPLETE").unlink()
    resumed = trained(spec, nproc=2)[-1]
    assert (resumed["step"], resumed["loss_scale"], resumed["skipped_steps"]) == (4, 2.0**56, 4)

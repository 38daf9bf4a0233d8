"""torchao's AdamW, with 8-bit state or all in bfloat16: whole trainings are saved and resumed exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine.optim.optimization import make_adamw
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.training import changed, make_training, trained


def uncompiled(spec_path: Path) -> int:
    """Train with torchao's step as it is written: on a CPU, compiling it takes minutes."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    return engine.main(spec_path)


@pytest.fixture
def whole(request: pytest.FixtureRequest, tmp_path: Path, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    """A training of two steps on two ranks, with a checkpoint after each."""
    made = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", ("text",) * 4, packs_per_step=2)
    optim = request.param
    groups = {"optim": {"optim": optim}, "parallel": {"bf16": optim == "adamw_bf16"}}
    spec = changed(made, tmp_path / "whole", **groups, run={"save_steps": 1, "save_async": True})
    trained(spec, nproc=2, main=uncompiled)
    return spec


def result(training: TrainSpec) -> dict[str, Any]:
    return json.loads((Path(training.run.output_dir) / "result.json").read_text())


@pytest.mark.parametrize(
    ("whole", "save_async"), [("adamw_8bit", False), ("adamw_bf16", True)], indirect=["whole"], ids=["8 bits", "bf16"]
)
def test_its_checkpoint_continues_the_run(whole: TrainSpec, save_async: bool, tmp_path: Path) -> None:
    assert result(whole)["save_async"] is save_async
    resumed = changed(whole, tmp_path / "resumed")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "checkpoint-2")
    shutil.rmtree(resumed.export.output_dir)
    trained(resumed, nproc=2, main=uncompiled)
    assert result(resumed)["resumed_from_step"] == 1
    weights = [load_file(Path(training.export.output_dir) / "model.safetensors") for training in (whole, resumed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    base = load_file(Path(whole.model.path) / "model.safetensors")
    assert any(not torch.equal(weight, base[name].to(weight.dtype)) for name, weight in weights[0].items())


def test_steps_too_small_for_bfloat16_count_on_average(
    tiny_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 1e-4 from a weight of 1, whose neighbours are 1/256 and 1/128 away: to the nearest, none would move."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    training = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", ("text",))
    spec = changed(training, tmp_path, optim={"optim": "adamw_bf16", "learning_rate": 1e-4}).optim
    torch.manual_seed(0)
    weights = nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    optimizer = make_adamw([{"params": [weights], "weight_decay": 0.0}], spec)
    for _ in range(10):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    assert weights.float().mean().item() == pytest.approx(1 - 10 * 1e-4, abs=1e-4)
    assert {str(value.dtype) for value in optimizer.state[weights].values() if value.ndim} == {"torch.bfloat16"}

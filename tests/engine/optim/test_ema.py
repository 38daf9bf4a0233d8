"""Muon and the average of the weights in a whole training: exported, resumed exactly, sharded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from qvl_pipeline.engine.optim.ema import WeightAverage
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.training import changed, make_training, trained

DECAY = 0.75


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    """Three steps of Muon on two ranks, with a checkpoint after each; the average is exported."""
    folder = tmp_path_factory.mktemp("ema")
    training = changed(
        make_training(folder, tiny_folders("qwen3_vl"), "qwen3_vl"),
        folder / "run",
        run={"save_steps": 1, "save_total_limit": 3},
        model={"freeze_modules": ("vit",)},
        optim={"optim": "muon", "ema_decay": DECAY, "learning_rates": {"merger": 1e-3}},
        export={"export_ema": True},
    )
    rows = trained(training, nproc=2)
    assert rows[0]["learning_rates"] == {"deepstack": 1e-2, "merger": 1e-3, "llm": 1e-2, "embed": 1e-2}
    return training


def exported(training: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(training.export.output_dir) / "model.safetensors")


def checkpoint(training: TrainSpec, step: int, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    dcp_to_torch_save(Path(training.run.output_dir) / "checkpoints" / f"checkpoint-{step}", folder / "full.pt")
    return torch.load(folder / "full.pt", weights_only=False)


def test_exported_average_is_that_of_the_weights_after_each_step(averaged: TrainSpec, tmp_path: Path) -> None:
    expected = load_file(Path(averaged.model.path) / "model.safetensors")
    base = dict(expected)
    for step in (1, 2, 3):
        weights = checkpoint(averaged, step, tmp_path)["model"]
        for name in expected.keys() & {stored.removeprefix("hf.") for stored in weights}:  # frozen ones are not there
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weights[f"hf.{name}"]
    for name, weight in exported(averaged).items():
        torch.testing.assert_close(weight, expected[name], msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(weight, base[name]) == (name.startswith("model.visual.") and "merger" not in name), name
    assert not torch.equal(
        exported(averaged)["model.language_model.norm.weight"], weights["hf.model.language_model.norm.weight"]
    )


def test_resumed_training_exports_the_same_average_bit_for_bit(averaged: TrainSpec, tmp_path: Path) -> None:
    resumed = changed(averaged, tmp_path / "run", run={"save_steps": 0})
    shutil.copytree(averaged.run.output_dir, resumed.run.output_dir)
    for step in (2, 3):
        shutil.rmtree(Path(resumed.run.output_dir) / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(resumed.export.output_dir)
    assert [row["step"] for row in trained(resumed, nproc=2)] == [1, 2, 3]
    expected = exported(averaged)
    assert all(torch.equal(weight, expected[name]) for name, weight in exported(resumed).items())
    momenta = [checkpoint(training, 3, tmp_path)["optimizer"]["state"] for training in (averaged, resumed)]
    assert "momentum_buffer" in momenta[0]["hf.model.language_model.layers.0.mlp.up_proj.weight"]
    for name, state in momenta[0].items():
        assert all(torch.equal(value, momenta[1][name][key]) for key, value in state.items()), name


def test_average_of_bfloat16_weights_is_kept_in_float32() -> None:
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = WeightAverage(model, decay=0.9999)
        model.weight.fill_(2.0)
    for _ in range(1000):
        average.update()
    torch.testing.assert_close(average.state["weight"], torch.tensor([[2 - 0.9999**1000]]), rtol=1e-3, atol=0)

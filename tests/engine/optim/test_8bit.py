"""AdamW with torchao's 8-bit state in a whole training: saved, whatever `save_async` says, and resumed exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine.spec import TrainSpec
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training


def uncompiled(spec_path: Path) -> int:
    """Train with torchao's step as it is written: on a CPU, compiling it takes minutes."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    return engine.main(spec_path)


def train(training: TrainSpec) -> None:
    folder = Path(training.run.output_dir)
    folder.mkdir(exist_ok=True)
    training.save(folder / "train_spec.json")
    run_ranks(uncompiled, 2, folder / "train_spec.json", log_dir=folder / "logs")


def test_its_checkpoint_continues_the_run(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> None:
    made = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", ("text",) * 4, packs_per_step=2)
    whole = changed(made, tmp_path / "whole", optim={"optim": "adamw_8bit"}, run={"save_steps": 1, "save_async": True})
    train(whole)
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["save_async"] is False
    resumed = changed(whole, tmp_path / "resumed")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "checkpoint-2")
    shutil.rmtree(resumed.export.output_dir)
    train(resumed)
    assert json.loads((tmp_path / "resumed" / "result.json").read_text())["resumed_from_step"] == 1
    weights = [load_file(Path(training.export.output_dir) / "model.safetensors") for training in (whole, resumed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())

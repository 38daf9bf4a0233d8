"""Models of chosen steps: those of that step, without a trace in training, complete whenever training was cut off."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from qvl_pipeline.engine.run.kept import KeptModels
from qvl_pipeline.engine.spec import TrainSpec, ValidationSpec
from tests.engine.training import changed, make_training, trained


@pytest.fixture
def training(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    """Three steps, each with an evaluation of two samples."""
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text", "image") * 6)
    plan = pd.read_parquet(base.data.pack_plan).iloc[[0, 1]].assign(step=0, pack=[0, 1])
    plan.astype({"step": "int32", "pack": "int32"}).to_parquet(tmp_path / "eval_plan.parquet", index=False)
    return dataclasses.replace(base, validation=ValidationSpec("steps", 1, str(tmp_path / "eval_plan.parquet"), False))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    pairs = weights(one), weights(other)
    return all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


def test_steps_are_kept_as_they_were_and_training_does_not_notice(training: TrainSpec, tmp_path: Path) -> None:
    plain = changed(training, tmp_path / "plain")
    kept = changed(training, tmp_path / "kept", export={"keep_checkpoints": ("best", "last", "every:1")})
    rows = [trained(plain, nproc=1), trained(kept, nproc=1)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    folder = tmp_path / "kept"
    steps = [folder / "kept" / f"step-{step}" for step in (1, 2, 3)]
    assert same(folder / "export", tmp_path / "plain" / "export")
    assert same(steps[2], folder / "export")
    assert not same(steps[0], steps[1])
    assert not same(steps[1], steps[2])
    losses = [row["eval_loss"] for row in rows[1]]
    best = losses.index(min(losses)) + 1
    facts = json.loads((folder / "result.json").read_text())["kept_checkpoints"]
    assert facts == {
        f"step-{step}": ["best"] * (step == best) + ["last"] * (step == 3) + ["every"] for step in (1, 2, 3)
    }
    assert sorted(path.name for path in steps[0].iterdir()) == sorted(
        path.name for path in (folder / "export").iterdir()
    )
    assert (steps[2] / "model.safetensors").samefile(folder / "export" / "model.safetensors"), "not written twice"


def test_the_best_is_kept_beside_the_last_on_two_ranks(training: TrainSpec, tmp_path: Path) -> None:
    # A rate at which the loss does not fall for ever.
    spec = changed(
        training,
        tmp_path / "two",
        optim={"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0},
        export={"keep_checkpoints": ("best", "last")},
        validation={"load_best_model_at_end": True},
    )
    losses = [row["eval_loss"] for row in trained(spec, nproc=2)]
    best = losses.index(min(losses)) + 1
    facts = json.loads((tmp_path / "two" / "result.json").read_text())["kept_checkpoints"]
    assert facts == ({f"step-{best}": ["best"], "step-3": ["last"]} if best < 3 else {"step-3": ["best", "last"]})
    assert sorted(path.name for path in (tmp_path / "two" / "kept").iterdir()) == sorted(facts)
    assert same(tmp_path / "two" / "kept" / f"step-{best}", tmp_path / "two" / "export")
    assert best == 3 or not same(tmp_path / "two" / "kept" / "step-3", tmp_path / "two" / "export")


def test_former_bests_go_once_a_checkpoint_knows_the_present_one(tmp_path: Path) -> None:
    kept = KeptModels(("best", "every:10"), tmp_path, leads=True)
    for step in (4, 7, 10, 12):
        kept.place(step).mkdir(parents=True)
    kept.forget_outdated(best_step=7, saved_step=10)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step-10", "step-12", "step-7"]

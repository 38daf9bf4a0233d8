"""A run that starts from another run's checkpoint: weights and moments are that one's, the parameters its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from qvl_pipeline.engine.run.checkpoints import Checkpoints, ModelState, OptimizerState
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained


def test_rates_and_precision_are_those_of_the_new_run(tiny_folders: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_folders("qwen3_vl")
    base = make_training(tmp_path, model, "qwen3_vl", kinds=("text", "image") * 3, packs_per_step=2)
    trained(changed(base, tmp_path / "first", run={"save_steps": 2, "save_total_limit": 9}), nproc=1)
    start = str(tmp_path / "first" / "checkpoints" / "checkpoint-2")
    again = changed(
        base,
        tmp_path / "second",
        run={"resume_from": start},
        optim={"learning_rate": 2e-4, "lr_scheduler_type": "constant", "warmup_steps": 0},
        parallel={"fp16": True},
    )
    (row,) = trained(again, nproc=1)
    assert row["step"] == 3
    assert set(row["learning_rates"].values()) == {2e-4}
    # The first run had no scale, so it starts at 65,536; a step that overflows halves it.
    assert row["loss_scale"] == 2.0 ** (16 - row["skipped_steps"])


def settings_are_kept(folder: Path) -> None:
    dist.init_process_group("gloo")
    kept = []
    for settings in ({"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.01, "weight_decay": 0.0, "betas": (0.5, 0.6)}):
        model = nn.Linear(6, 4)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
        state = {"model": ModelState(model), "optimizer": OptimizerState(model, [optimizer])}
        checkpoints = Checkpoints(folder, state, rank_state={}, identity={}, keep=1, asynchronous=False)
        if kept:
            checkpoints.load(folder / "checkpoint-1")
            assert {name: optimizer.param_groups[0][name] for name in settings} == settings
            moments = [optimizer.state[parameter]["exp_avg"].full_tensor() for parameter in model.parameters()]
            assert all(map(torch.equal, moments, kept))
        else:
            model(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
            checkpoints.save(1)
            kept = [optimizer.state[parameter]["exp_avg"].full_tensor() for parameter in model.parameters()]


@pytest.mark.parametrize("nproc", [1, 2])
def test_moments_are_taken_over_and_settings_are_not(nproc: int, tmp_path: Path) -> None:
    run_ranks(settings_are_kept, nproc, tmp_path / "run", log_dir=tmp_path / "logs")

"""How long ranks wait for each other: long until the first step is done, then as long as a step may take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine import trainer
from qvl_pipeline.engine.parallel.sharding import start_process_group
from qvl_pipeline.engine.run.watchdog import collective_timeout_s, set_collective_timeout
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training


def rank_1_never_comes(done: Path, *, in_group_of_sharding: bool) -> None:
    mesh, _ = start_process_group(1, 600.0)
    sharding = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    set_collective_timeout(0.5, mesh, sharding)
    group = sharding.get_group("shard") if in_group_of_sharding else None
    if dist.get_rank() == 1:
        while not done.exists():
            time.sleep(0.1)
        return
    with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
        dist.all_reduce(torch.ones(1), group=group)
    done.touch()


@pytest.mark.parametrize("in_group_of_sharding", [False, True])
def test_a_collective_that_a_rank_never_enters_fails_after_the_time_that_was_set(
    in_group_of_sharding: bool, tmp_path: Path
) -> None:
    never_comes = partial(rank_1_never_comes, in_group_of_sharding=in_group_of_sharding)
    run_ranks(never_comes, 2, tmp_path / "done", log_dir=tmp_path / "logs")


def main_noting_timeouts(spec_path: Path) -> int:
    trainers: list[trainer.Trainer] = []
    noted: list[tuple[int, float, float]] = []

    class Noted(trainer.Trainer):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            trainers.append(self)

    def note(seconds: float, batches: DeviceMesh, sharding: DeviceMesh) -> None:
        assert batches is trainers[0].mesh
        assert sharding.mesh_dim_names == ("replicate", "shard")
        noted.append((trainers[0].step, seconds, trainers[0].watchdog.timeout_s))

    engine.Trainer, trainer.set_collective_timeout = Noted, note
    status = engine.main(spec_path)
    (spec_path.parent / "noted.json").write_text(json.dumps(noted))
    return status


def test_timeouts_are_those_of_a_step_after_the_first_and_before_the_export(
    tmp_path: Path, tiny_folders: Callable[[str], Path]
) -> None:
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl", ("text",) * 3, packs_per_step=1)
    training = changed(base, tmp_path, run={"step_timeout_s": 33.0, "ddp_timeout": 99}, parallel={"hsdp_shard_size": 1})
    training.save(tmp_path / "train_spec.json")
    run_ranks(main_noting_timeouts, 1, tmp_path / "train_spec.json", log_dir=tmp_path / "logs")
    assert json.loads((tmp_path / "noted.json").read_text()) == [[1, collective_timeout_s(33.0), 33.0], [3, 99, 33.0]]

"""Muon over shards is torch's Muon over whole matrices, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from qvl_pipeline.engine.optim.muon import ShardedMuon
from tests.engine.ranks import run_ranks

# Fewer rows than ranks, rows that no rank count divides, wide and tall; more matrices than ranks, and not a multiple.
SHAPES = ((2, 5), (7, 16), (16, 7), (5, 5), (12, 3), (1, 8), (9, 9))
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def same_as_whole(replicas: int) -> None:
    """Take three steps on every rank with shards, and with whole matrices; compare weights and momenta."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas))
    placements = (Replicate(), Shard(0))
    whole = [torch.nn.Parameter(tensor) for tensor in tensors(0)]
    sharded = [torch.nn.Parameter(distribute_tensor(tensor, mesh, placements)) for tensor in tensors(0)]
    expected, actual = torch.optim.Muon(whole, **OPTIONS), ShardedMuon(sharded, **OPTIONS)
    for step in range(1, 4):
        for parameter, reference, gradient in zip(sharded, whole, tensors(step), strict=True):
            reference.grad, parameter.grad = gradient, distribute_tensor(gradient, mesh, placements)
        expected.step()
        actual.step()
    for parameter, reference in zip(sharded, whole, strict=True):
        momentum = actual.state[parameter]["momentum_buffer"]
        assert isinstance(momentum, DTensor)
        assert torch.equal(momentum.full_tensor(), expected.state[reference]["momentum_buffer"])
        assert torch.equal(parameter.full_tensor(), reference)


def same_in_float32() -> None:
    """Take a step of gradients that differ in their last bits, in float32, and one in bfloat16."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = [torch.nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in tensors(0) * 3]
    sets = made[: len(SHAPES)], made[len(SHAPES) : 2 * len(SHAPES)], made[2 * len(SHAPES) :]
    dtypes = torch.float32, torch.float32, torch.bfloat16
    for number, (parameters, dtype) in enumerate(zip(sets, dtypes, strict=True)):
        optimizer = ShardedMuon(parameters, dtype=dtype, **OPTIONS)
        for parameter, gradient in zip(parameters, tensors(1), strict=True):
            parameter.grad = distribute_tensor(gradient * (1 + number * 1e-7), mesh, [Shard(0)])
        optimizer.step()
    start, same, other, half = (
        [p.full_tensor() if isinstance(p, DTensor) else p for p in each] for each in (tensors(0), *sets)
    )
    for before, a, b, c in zip(start, same, other, half, strict=True):
        torch.testing.assert_close(b - before, a - before, rtol=1e-4, atol=1e-7)
        assert (c - a).norm() < 0.05 * (a - before).norm()


def test_in_float32_last_bits_stay_last_bits(tmp_path: Path) -> None:
    run_ranks(same_in_float32, 2, log_dir=tmp_path)


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (3, 1), (4, 2)])
def test_same_as_one_process(ranks: int, replicas: int, tmp_path: Path) -> None:
    run_ranks(same_as_whole, ranks, replicas, log_dir=tmp_path)


def columns_are_refused() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1,))
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    parameter.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="sharded over their rows"):
        ShardedMuon([parameter]).step()


def test_matrices_sharded_over_columns_are_refused(tmp_path: Path) -> None:
    run_ranks(columns_are_refused, 1, log_dir=tmp_path)

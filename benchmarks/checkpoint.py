"""How long a checkpoint stops training: written in the background against written at once, on two gloo ranks.

A model of 25M parameters with AdamW state is sharded with FSDP2; `engine.checkpoints.Checkpoints` saves it several
times either way, between steps that go on while the background writes. The stall of a save is the time `save` takes on
the slowest rank. Steps beside a background write are timed as well: what it takes from them is no stall, but no gift.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.report import report
from qvl_pipeline.engine.run.checkpoints import Checkpoints, ModelState, OptimizerState, RandomState
from qvl_pipeline.ports import free_port

RANKS = 2
SAVES = 3
WIDTH, LAYERS = 1024, 6
TARGET = 0.15


def main() -> None:
    """Measure both ways in one job, and report."""
    with tempfile.TemporaryDirectory() as folder:
        results = _run_ranks(Path(folder))
    rows = [
        {
            "mode": mode,
            "saves": SAVES,
            "gib": round(results["gib"], 3),
            "stall_s": statistics.median(results[mode]["stalls"]),
            "worst_stall_s": max(results[mode]["stalls"]),
            "step_s": statistics.median(results[mode]["steps"]),
            "until_published_s": statistics.median(results[mode]["published"]),
        }
        for mode in ("blocking", "async")
    ]
    ratios = {
        "async_stall_over_blocking": rows[1]["stall_s"] / rows[0]["stall_s"],
        "step_beside_a_write_over_step": rows[1]["step_s"] / rows[0]["step_s"],
    }
    report("checkpoint", rows, ratios=ratios, targets={"async_stall_over_blocking": f"<= {TARGET}"})


def _run_ranks(folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    port = free_port()
    ranks = [context.Process(target=_measure, args=(rank, port, folder, results)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank ended with status {process.exitcode}")
    return results.get()


def _measure(rank: int, port: int, folder: Path, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(*(_Block() for _ in range(LAYERS)))
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, [optimizer])}
    values = sum(p.numel() for p in model.parameters())
    measured: dict[str, Any] = {"gib": 3 * 4 * values / 2**30}
    for mode in ("blocking", "async"):
        checkpoints = Checkpoints(
            folder / mode,
            state,
            rank_state={"random": RandomState(torch.device("cpu"))},
            identity={},
            keep=1,
            asynchronous=mode == "async",
        )
        measured[mode] = _save_several_times(checkpoints, model, optimizer)
    dist.destroy_process_group()
    if rank == 0:
        results.put(measured)


def _save_several_times(
    checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, list[float]]:
    stalls, steps, published = [], [], []
    for number in range(1, SAVES + 2):
        _step(model, optimizer)
        dist.barrier()
        started = time.perf_counter()
        checkpoints.save(number)
        stall = time.perf_counter() - started
        step_started = time.perf_counter()
        _step(model, optimizer)
        step = time.perf_counter() - step_started
        checkpoints.wait()
        slowest = torch.tensor([stall, step, time.perf_counter() - started])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if number > 1:  # the first save allocates the buffers that the others reuse, and the optimizer's state
            for figures, value in zip((stalls, steps, published), slowest.tolist(), strict=True):
                figures.append(value)
    return {"stalls": stalls, "steps": steps, "published": published}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(64, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class _Block(nn.Module):
    """A residual MLP of 4 * `WIDTH` ** 2 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


if __name__ == "__main__":
    main()

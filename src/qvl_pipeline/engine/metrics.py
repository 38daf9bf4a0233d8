"""`metrics.jsonl`: one row for every logged step, summed over ranks without waiting between logged steps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class MetricsWindow:
    """Sums of the steps since the last row; losses stay on the device until a row is due."""

    def __init__(self, sources: tuple[str, ...], device: torch.device) -> None:
        """Start an empty window."""
        self._sources = sources
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros(len(self._sources), device=self._device, dtype=torch.float64)
        self._count = torch.zeros(len(self._sources), device=self._device, dtype=torch.float64)
        self._tokens = self._steps = 0
        self._waited_s = 0.0
        self._started = time.perf_counter()

    def add_losses(self, losses: torch.Tensor, sources: torch.Tensor) -> None:
        """Add the token losses `[S]` of one micro-batch and the source of each."""
        self._loss.index_add_(0, sources, losses.detach().double())
        self._count.index_add_(0, sources, torch.ones_like(losses, dtype=torch.float64))

    def add_step(self, tokens: int, waited_s: float) -> None:
        """Count a finished step: its tokens over all ranks and the seconds this rank waited for data."""
        self._tokens += tokens
        self._waited_s += waited_s
        self._steps += 1

    def row(self) -> dict[str, Any]:
        """Sum over ranks, return the window's figures and start the next one; called by all ranks."""
        sums = torch.stack([self._loss, self._count])
        dist.all_reduce(sums)
        loss, count = sums.tolist()
        elapsed = time.perf_counter() - self._started
        by_source = {name: total / n for name, total, n in zip(self._sources, loss, count, strict=True) if n > 0}
        row = {
            "loss": sum(loss) / sum(count),
            "tokens_per_second": self._tokens / elapsed,
            "tokens": self._tokens,
            "supervised_tokens": int(sum(count)),
            "step_time_s": elapsed / self._steps,
            "data_wait_share": self._waited_s / elapsed,
            "peak_memory_gib": _peak_memory_gib(self._device),
            "loss_by_source": by_source,
        }
        self._reset()
        return row


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, which a resumed run will write again, and a last one that was cut off."""
    if path.exists():
        *lines, _cut_off = path.read_text().split("\n")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
        partial.replace(path)

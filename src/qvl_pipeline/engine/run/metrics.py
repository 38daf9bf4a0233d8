"""`metrics.jsonl`: one row for every logged step, gathered from all ranks; nothing waits for a device between rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.feed.steps import Step
from qvl_pipeline.engine.model.flops import ModelFlops, peak_flops
from qvl_pipeline.engine.model.routing import expert_load
from qvl_pipeline.storage.whole import write_whole


class SourceLosses:
    """Sums of token losses by source, kept on the device."""

    def __init__(self, sources: tuple[str, ...], device: torch.device) -> None:
        """Start at zero."""
        self._sources = sources
        self.sums = torch.zeros(2, len(sources), device=device, dtype=torch.float64)

    def add(self, losses: torch.Tensor, sources: torch.Tensor) -> None:
        """Add the token losses `[S]` of one micro-batch and the number of each one's source."""
        # Summed by a mask: on a GPU `index_add_` adds in any order, and equal runs would differ in the last bits.
        mask = sources[:, None] == torch.arange(len(self._sources), device=sources.device)
        self.sums[0] += (losses.detach().double()[:, None] * mask).sum(0)
        self.sums[1] += mask.sum(0)

    def means(self, sums: torch.Tensor) -> tuple[float | None, dict[str, float], int]:
        """Turn sums over all ranks, `[2, sources]` on the host, into mean loss, mean loss by source, and tokens.

        Without a token, as when all samples were skipped, there is no loss.
        """
        loss, count = sums.tolist()
        by_source = {name: total / n for name, total, n in zip(self._sources, loss, count, strict=True) if n > 0}
        tokens = int(sum(count))
        return sum(loss) / tokens if tokens else None, by_source, tokens


class MetricsWindow:
    """What happened since the last row; each rank counts its own, and a row gathers them in one exchange.

    Attributes:
        losses: Sums of token losses.
        choices: Of each step, how often all ranks chose each expert, `[layers, experts]`; none without experts.
    """

    def __init__(
        self,
        sources: tuple[str, ...],
        device: torch.device,
        flops: ModelFlops,
        *,
        packing_length: int,
    ) -> None:
        """Start an empty window.

        Args:
            sources: Names of the sources, in the order of `Batch.target_source`.
            device: This rank's device.
            flops: FLOPs of the model.
            packing_length: Token budget of a pack.
        """
        self._sources = sources
        self._device = device
        self._flops = flops
        self._packing_length = packing_length
        self._peak_flops = peak_flops(device)
        self._reset()

    def _reset(self) -> None:
        self.losses = SourceLosses(self._sources, self._device)
        self.choices: list[torch.Tensor] = []
        self._tokens = self._packs = self._steps = 0
        self._work = self._waited_s = 0.0
        self._started = time.perf_counter()

    def add_batch(self, batch: Batch, waited_s: float) -> None:
        """Count a micro-batch of this rank that is still in host memory, and the seconds spent waiting for it."""
        self._work += self._flops.count(batch)
        self._waited_s += waited_s

    def add_step(self, step: Step) -> None:
        """Count a finished step, over all ranks."""
        self._tokens += step.tokens
        self._packs += step.packs
        self._steps += 1

    def exclude(self, seconds: float) -> None:
        """Take out of the window time that was not spent training."""
        self._started += seconds

    def row(self) -> dict[str, Any]:
        """Gather from all ranks, return the window's figures and start the next one; called by all ranks.

        `step_time_s` of a rank ends before it waits for the others here. With FSDP all ranks wait for each other in
        every layer as well, so that a rank which holds up the rest shows by its data wait or by its share of the work.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed = time.perf_counter() - self._started
        own = [elapsed, self._waited_s, self._work, _peak_memory_gib(self._device)]
        own_tensor = torch.tensor(own, dtype=torch.float64, device=self._device)
        everyone = _gather(torch.cat([self.losses.sums.flatten(), own_tensor]))
        sums = everyone[:, : -len(own)].sum(0).view(2, -1)
        loss, by_source, supervised = self.losses.means(sums)
        times, waits, work, memory = everyone[:, -len(own) :].T.tolist()
        elapsed, world_size = max(times), len(times)
        flops_per_second = sum(work) / world_size / elapsed
        row = {
            # Trackers may get a row long after; sent twice, it is known by its time to be the same.
            "time": time.time(),
            "loss": loss,
            "tokens_per_second": self._tokens / elapsed,
            "tokens_per_second_per_rank": self._tokens / elapsed / world_size,
            "tflops_per_rank": flops_per_second / 1e12,
            "mfu": flops_per_second / self._peak_flops if self._peak_flops else None,
            "tokens": self._tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / self._tokens,
            "pack_fill": self._tokens / (self._packs * self._packing_length),
            "step_time_s": elapsed / self._steps,
            "slowest_rank": times.index(max(times)),
            "slowest_step_time_s": max(times) / self._steps,
            "fastest_rank": times.index(min(times)),
            "fastest_step_time_s": min(times) / self._steps,
            "data_wait_share": max(waits) / elapsed,
            "work_imbalance": max(work) * world_size / sum(work) if sum(work) else None,
            "peak_memory_gib": max(memory),
            "loss_by_source": by_source,
            **(expert_load(torch.stack(self.choices).sum(0).cpu()) if self.choices else {}),
        }
        self._reset()
        return row


def _gather(values: torch.Tensor) -> torch.Tensor:
    """Gather a vector `[N]` of each rank to `[ranks, N]`, on the host."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered).cpu()


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the complete rows; none when there is no file yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, which a resumed run will write again, and a last one that was cut off."""
    if path.exists():
        *lines, _cut_off = path.read_text(encoding="utf-8").split("\n")
        write_whole(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

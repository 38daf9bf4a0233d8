"""`metrics.jsonl`: one row for every logged step, gathered from all ranks by the hosts, which wait for no device."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.feed.steps import Step
from qvl_pipeline.engine.model.flops import ModelFlops, peak_flops
from qvl_pipeline.engine.model.routing import expert_load
from qvl_pipeline.engine.parallel.fetching import Moment, OnItsWay, gather_on_hosts
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
    """What happened since the last row; each rank counts its own.

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
        self._work = self._waited_s = self._excluded_s = 0.0
        self._started = Moment(self._device)

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
        self._excluded_s += seconds

    def close(self) -> ClosedWindow:
        """End the window here and start the next one, without waiting for the device."""
        closed = ClosedWindow(
            losses=self.losses,
            sums=OnItsWay(self.losses.sums),
            span=(self._started, Moment(self._device), self._excluded_s),
            tokens=self._tokens,
            steps=self._steps,
            waited_s=self._waited_s,
            work=self._work,
            capacity=self._packs * self._packing_length,
            peak_flops=self._peak_flops,
            peak_memory_gib=_peak_memory_gib(self._device),
            choices=OnItsWay(torch.stack(self.choices).sum(0)) if self.choices else None,
        )
        self._reset()
        return closed


@dataclass(frozen=True)
class ClosedWindow:
    """The figures of a window, of which the device may still owe some.

    Attributes:
        losses: What turns `sums` into means.
        sums: This rank's sums of losses and tokens by source.
        span: The moments of beginning and end, and seconds in between that do not count.
        tokens: Of all ranks.
        steps: Steps taken.
        waited_s: Seconds that this rank waited for batches.
        work: FLOPs of this rank.
        capacity: Tokens that the packs could hold.
        peak_flops: What the device could do in a second, if known.
        peak_memory_gib: Of this rank.
        choices: How often all ranks chose each expert, `[layers, experts]`; `None` without experts.
        time: When it was closed, in seconds since 1970. Trackers may get a row long after; sent twice, it is known by
            its time to be the same.
    """

    losses: SourceLosses
    sums: OnItsWay
    span: tuple[Moment, Moment, float]
    tokens: int
    steps: int
    waited_s: float
    work: float
    capacity: int
    peak_flops: float | None
    peak_memory_gib: float
    choices: OnItsWay | None = None
    time: float = field(default_factory=time.time)

    def row(self) -> dict[str, Any]:
        """Gather the figures from all ranks, in one exchange among the hosts; called by all ranks.

        `step_time_s` of a rank ends before it waits for the others here. With FSDP all ranks wait for each other in
        every layer as well, so that a rank which holds up the rest shows by its data wait or by its share of the work.
        """
        sums = self.sums.arrived()
        started, ended, excluded_s = self.span
        own = [ended.seconds_since(started) - excluded_s, self.waited_s, self.work, self.peak_memory_gib]
        everyone = gather_on_hosts(torch.cat([sums.flatten(), torch.tensor(own, dtype=torch.float64)]))
        loss, by_source, supervised = self.losses.means(everyone[:, : -len(own)].sum(0).view(2, -1))
        times, waits, work, memory = everyone[:, -len(own) :].T.tolist()
        elapsed, world_size = max(times), len(times)
        flops_per_second = sum(work) / world_size / elapsed
        return {
            "time": self.time,
            "loss": loss,
            "tokens_per_second": self.tokens / elapsed,
            "tokens_per_second_per_rank": self.tokens / elapsed / world_size,
            "tflops_per_rank": flops_per_second / 1e12,
            "mfu": flops_per_second / self.peak_flops if self.peak_flops else None,
            "tokens": self.tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / self.tokens,
            "pack_fill": self.tokens / self.capacity,
            "step_time_s": elapsed / self.steps,
            "slowest_rank": times.index(max(times)),
            "slowest_step_time_s": max(times) / self.steps,
            "fastest_rank": times.index(min(times)),
            "fastest_step_time_s": min(times) / self.steps,
            "data_wait_share": max(waits) / elapsed,
            "work_imbalance": max(work) * world_size / sum(work) if sum(work) else None,
            "peak_memory_gib": max(memory),
            "loss_by_source": by_source,
            **(expert_load(self.choices.arrived()) if self.choices else {}),
        }


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

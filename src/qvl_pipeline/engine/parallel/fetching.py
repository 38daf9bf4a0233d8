"""Values of a device that the host takes when they have arrived, instead of waiting for them."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


class OnItsWay:
    """A copy of a tensor on its way to the host, as it is now; the device goes on with what comes next."""

    def __init__(self, values: torch.Tensor) -> None:
        """Start the copy."""
        self._event: torch.cuda.Event | None = None
        values = values.detach()
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values.clone()

    def arrived(self) -> torch.Tensor:
        """Return the copy, in host memory; waits for it where it was not given the time."""
        if self._event:
            self._event.synchronize()
        return self._values


class Moment:
    """When a device gets here with its work; known only then, so nothing waits to know it."""

    def __init__(self, device: torch.device) -> None:
        """Note the moment."""
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._clock = time.perf_counter()
        if self._event:
            self._event.record()

    def seconds_since(self, earlier: Moment) -> float:
        """Return the seconds between two moments of one device; waits until it has reached this one."""
        if self._event is None or earlier._event is None:
            return self._clock - earlier._clock
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


def gather_on_hosts(values: torch.Tensor) -> torch.Tensor:
    """Gather a vector `[N]` in host memory of each rank to `[ranks, N]`; no GPU takes part."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)

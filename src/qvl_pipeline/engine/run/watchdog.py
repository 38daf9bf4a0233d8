"""A thread that ends a rank whose step takes too long, and says where it stands."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# How much longer than the timeout a rank may compute before it counts as hanging itself. Most hangs are one rank that
# waits for its data while all others wait for it in a collective: the one at fault reports first.
_MARGIN_S = 10.0


class StepTimeoutError(RuntimeError):
    """A step takes longer than allowed."""


class Watchdog:
    """Watches this rank's steps from a thread.

    Attributes:
        timeout_s: Seconds that a step may take; may be changed between steps.
        awaits: What of its own the rank waits for, such as its next batch; empty while it computes, or waits for other
            ranks.
    """

    def __init__(self, timeout_s: float, on_timeout: Callable[[StepTimeoutError, str], None]) -> None:
        """Start watching.

        Args:
            timeout_s: Seconds that a step may take; may be infinite.
            on_timeout: Called from the watching thread, with the error and where every Python thread stands. It ends
                the process: a thread in a system call or a collective cannot be interrupted otherwise.
        """
        self.timeout_s = timeout_s
        self.awaits = ""
        self._on_timeout = on_timeout
        self._step = 0
        self._started: float | None = None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch one step."""
        self._step, self._started = number, time.monotonic()
        try:
            yield
        finally:
            self._started = None

    @contextlib.contextmanager
    def load(self, what: str = "its next batch") -> Iterator[None]:
        """Mark what is done inside as waiting for data."""
        before, self.awaits = self.awaits, what
        try:
            yield
        finally:
            self.awaits = before

    def wait_for_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Mark what is done inside, while data are waited for, as waiting for other ranks."""
        return self.load("")

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.timeout_s / 4))
            started, awaits = self._started, self.awaits
            if started is None:
                continue
            took = time.monotonic() - started
            if took > self.timeout_s + (0.0 if awaits else _margin_s(self.timeout_s)):
                doing = f"waits for {awaits}" if awaits else "computes, or waits for other ranks"
                error = StepTimeoutError(
                    f"step {self._step} has taken {took:.0f} s, more than train.launch.step_timeout_s = "
                    f"{self.timeout_s:g}, and this rank still {doing}: look at what is named here, or raise it"
                )
                self._on_timeout(error, _stacks())
                return


def _margin_s(timeout_s: float) -> float:
    return min(_MARGIN_S, timeout_s)


def collective_timeout_s(step_timeout_s: float) -> float:
    """Return how long a collective may take: longer than all watchdogs need to report, for it cannot tell whose fault.

    It is what ends a rank whose watchdog cannot, because no thread of Python gets to run.
    """
    return step_timeout_s + 2 * _margin_s(step_timeout_s)


def _stacks() -> str:
    """Say where every Python thread but the watchdog stands, the main thread last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    texts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sorted(frames.items(), key=lambda item: item[0] == main)
    ]
    return "\n".join(texts)


def set_collective_timeout(seconds: float, *meshes: DeviceMesh) -> None:
    """Set after how many seconds a collective of these meshes, or of all ranks, that some rank never enters fails.

    Called by all ranks.

    Loading and the first step (compilation, kernel choice, connections) may take long; a later one that does hangs.
    """
    if torch.cuda.is_available():
        # No collective may be under way with the old timeout on one rank and the new one on another.
        dist.barrier()
        torch.cuda.synchronize()
    groups = [mesh.get_group(name) for mesh in meshes for name in mesh.mesh_dim_names or ()]
    for group in [None, *groups]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

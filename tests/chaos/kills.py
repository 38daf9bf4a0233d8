"""Kills: a process of a run, of one kind or any, gets a signal at a moment of its life."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable

import psutil

from tests.chaos.harness import Disturbance, Run

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSEGV)
# Seconds within which a process of a kind gets its signal, once there is one.
SOON_S = 4.0


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _parent(process: psutil.Process) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        return process.parent()
    return None


def _is_torchrun(process: psutil.Process | None) -> bool:
    return process is not None and "torch.distributed.run" in _command(process)


def _is_forkserver(process: psutil.Process | None) -> bool:
    return process is not None and "multiprocessing.forkserver" in _command(process)


# How a process of a kind is known.
KINDS: dict[str, Callable[[psutil.Process], bool]] = {
    "torchrun": _is_torchrun,
    "rank": lambda process: _is_torchrun(_parent(process)),
    "loader": lambda process: (parent := _parent(process)) is not None and _is_torchrun(_parent(parent)),
    "decoder": lambda process: _is_forkserver(process) and _is_forkserver(_parent(process)),
    "forkserver": lambda process: _is_forkserver(process) and not _is_forkserver(_parent(process)),
    "prober": lambda process: "probe_worker" in _command(process),
}


def kill_parent(run: Run, rng: random.Random) -> str:
    """Signal the command itself, at any moment of a run."""
    moment, number = rng.uniform(0, run.seconds), rng.choice(SIGNALS)
    _wait(run, lambda: False, moment)
    return _signal(run, run.process.pid, number, f"the command, after {moment:.1f} s")


def kill_any(run: Run, rng: random.Random) -> str:
    """Signal any process, at any moment of a run."""
    moment, number = rng.uniform(0, run.seconds), rng.choice(SIGNALS)
    _wait(run, lambda: False, moment)
    processes = sorted(run.processes(), key=lambda process: process.pid)
    if not processes:
        return ""
    chosen = rng.choice(processes)
    return _signal(run, chosen.pid, number, f"'{_command(chosen)[:80]}', after {moment:.1f} s")


def kill(kind: str, within_s: float = SOON_S) -> Disturbance:
    """Signal a process of a kind within seconds after there is one; of those that ended before, another."""

    def disturb(run: Run, rng: random.Random) -> str:
        deadline = time.monotonic() + 4 * run.seconds
        while _wait(run, lambda: bool(_of_kind(run, kind)), deadline - time.monotonic()):
            delay, number = within_s * rng.random() ** 6, rng.choice(SIGNALS)  # mostly at once: some live for a second
            _wait(run, lambda: False, delay)
            if found := _of_kind(run, kind):
                return _signal(run, rng.choice(found).pid, number, f"a {kind}, {delay:.1f} s after its start")
        return ""

    return disturb


def kill_publication(run: Run, rng: random.Random) -> str:
    """Signal the command between the end of its training and its own, after which nothing is to be trained again."""
    delay, number = rng.uniform(0, 2.0), rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    scratch = run.folder / "data/06_models"
    if not _wait(run, lambda: any(scratch.glob("*/scratch/*/result.json")), 4 * run.seconds):
        return ""
    _wait(run, lambda: False, delay)
    return _signal(run, run.process.pid, number, f"the command, {delay:.1f} s after its training")


DISTURBANCES: dict[str, Disturbance] = {
    "command": kill_parent,
    "any": kill_any,
    "publication": kill_publication,
    **{kind: kill(kind) for kind in KINDS},
}


def _of_kind(run: Run, kind: str) -> list[psutil.Process]:
    return sorted((process for process in run.processes() if KINDS[kind](process)), key=lambda process: process.pid)


def _wait(run: Run, condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until a condition holds; not longer than some seconds, nor than the run."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and run.process.poll() is None:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _signal(run: Run, pid: int, number: int, what: str) -> str:
    if run.process.poll() is not None:
        return ""
    try:
        psutil.Process(pid).send_signal(number)
    except psutil.Error:
        return ""
    return f"{signal.Signals(number).name} to {what}"

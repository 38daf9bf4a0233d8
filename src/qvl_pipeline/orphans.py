"""Processes that end when the one they work for does, however that ends: asked of the kernel, which never forgets.

An orphan would go on writing beside the run that takes its place, or hang in a decoder until the machine is restarted.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

from qvl_pipeline.locks import holding

# Environment variable of the ranks: the process that started torchrun.
LAUNCHER = "QVL_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1
_F_SETSIG = 10  # Linux's own; Python has no name for it


def end_with_parent(number: int = signal.SIGKILL, grandparent: str = "") -> None:
    """Get a signal when the parent is gone: more exactly, the thread of it that started this process.

    Whoever is started by a thread that may end before its process does needs `end_with` instead.

    Args:
        number: The signal.
        grandparent: Process id of the parent's parent, where it is known: a parent that was gone before is noticed.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent or (grandparent and _parent_of(parent) not in (grandparent, None)):
        os.kill(os.getpid(), number)


def _parent_of(process: int) -> str | None:
    """Return the process id of a process's parent; `None` where the system does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
    except OSError:
        return None


@contextlib.contextmanager
def start_rank(folder: Path) -> Iterator[None]:
    """Prepare a process that torchrun started: it ends with torchrun, and shares the lock of the run's folder.

    So no other run begins to write there while one of its ranks is left, not even where its launcher is gone.

    Args:
        folder: Where the ranks write.

    Raises:
        BlockingIOError: Another run holds the folder.
    """
    end_with_parent(grandparent=os.environ.get(LAUNCHER, ""))
    with holding(folder, shared=True):
        yield


def end_with(pipe: int) -> None:
    """End when the other end of a pipe is closed, as it is with the process that holds it; also amid C code that hangs.

    Args:
        pipe: File descriptor of the reading end, into which nothing is ever written.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it was closed before
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_client() -> None:
    """End with the process that had a forkserver start this one; the forkserver lives as long as its children."""
    import multiprocessing

    if (client := multiprocessing.parent_process()) is not None:
        with contextlib.suppress(OSError):  # a system without it: they end when they next read from their pipe
            end_with(client.sentinel)

"""Locks on folders: the operating system's, which end with the last process that holds them, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def lock(folder: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """Lock a folder for this process, and for those that inherit the handle.

    Args:
        folder: An existing folder. No file is made in it.
        shared: Let others hold it too, who also share it.
        wait: Until others let it go.

    Returns:
        A file descriptor; closing it ends the lock. `None` on a file system without locks (some of clusters).

    Raises:
        BlockingIOError: Others hold it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        return handle if relock(handle, shared=shared, wait=wait) else _close(handle)
    except BaseException:
        os.close(handle)
        raise


def relock(handle: int, *, shared: bool, wait: bool = False) -> bool:
    """Turn a lock into a shared one, or one that is not; return `False` on a file system without locks.

    Raises:
        BlockingIOError: Others hold it, and this process no longer does.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def holding(folder: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold a lock meanwhile; as `lock`.

    Yields:
        Whether there is one: some file systems have no locks.

    Raises:
        BlockingIOError: Others hold it.
    """
    handle = lock(folder, shared=shared, wait=wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def turn(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Do something in a folder while nobody else who takes turns does.

    Args:
        folder: The folder; made when missing.
        on_wait: Called before waiting for another process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(holding(folder))
        except BlockingIOError:
            on_wait()
            held.enter_context(holding(folder, wait=True))
        yield


def _close(handle: int) -> None:
    os.close(handle)

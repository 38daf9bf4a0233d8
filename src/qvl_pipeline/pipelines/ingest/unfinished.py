"""The folder that a run writes into before its tables are moved into place; what a killed run left is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory

PREFIX = ".unfinished-"


def unfinished_folder(cache: Path) -> TemporaryDirectory[str]:
    """Make the folder, and remove those of runs that were killed.

    Each run holds a lock on its folder, which the operating system ends with the process, however that ends: the folder
    of another run that is still going on is not touched. On a file system without locks, nothing is removed.

    Args:
        cache: Where to make it.

    Returns:
        The folder; it is removed with this object, at the latest when the process ends.
    """
    cache.mkdir(parents=True, exist_ok=True)
    # Two runs that start at once take turns: else one could find the other's folder before the other has locked it.
    turn = _lock(cache)
    if turn is not None:
        for left in cache.glob(f"{PREFIX}*"):
            if (handle := _lock(left, fcntl.LOCK_NB)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)
    folder = TemporaryDirectory(dir=cache, prefix=PREFIX)
    if (handle := _lock(Path(folder.name))) is not None:
        weakref.finalize(folder, os.close, handle)
    if turn is not None:
        os.close(turn)
    return folder


def _lock(folder: Path, flags: int = 0) -> int | None:
    """Lock a folder; `None` where another process holds it, it is gone, or its file system has no locks."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle

"""A folder that belongs to one run: what a killed run left of its own is removed by the next."""

from __future__ import annotations

import os
import shutil
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory

from qvl_pipeline.locks import lock

PREFIX = ".unfinished-"


def unfinished_folder(parent: Path, prefix: str = PREFIX) -> TemporaryDirectory[str]:
    """Make the folder, and remove those of runs that were killed.

    Each run holds a lock on its folder, which the operating system ends with the process, however that ends: the folder
    of another run that is still going on is not touched. On a file system without locks, nothing is removed.

    Args:
        parent: Where to make it.
        prefix: How the names of such folders begin, and of nothing else there.

    Returns:
        The folder; it is removed with this object, at the latest when the process ends.
    """
    parent.mkdir(parents=True, exist_ok=True)
    # Two runs that start at once take turns: else one could find the other's folder before the other has locked it.
    turn = _lock(parent, wait=True)
    if turn is not None:
        for left in parent.glob(f"{prefix}*"):
            if (handle := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)
    folder = TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True)
    if (handle := _lock(Path(folder.name))) is not None:
        weakref.finalize(folder, os.close, handle)
    if turn is not None:
        os.close(turn)
    return folder


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Lock a folder; `None` where another process holds it, it is gone or not ours, or its file system has no locks."""
    try:
        return lock(folder, wait=wait)
    except OSError:
        return None

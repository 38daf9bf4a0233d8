"""Full disks: whatever a library raises then, as one sentence with the place, the need and the free space."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qvl_pipeline.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What safetensors, copytree, torch, Arrow and SQLite say, some of them without an errno. SQLite's `disk I/O error` is
# what it makes of a limit on the size of files.
_TEXTS = re.compile(
    "|".join([*(os.strerror(number) for number in _FULL), "disk is full", "disk I/O error"])
    + r"|PytorchStreamWriter failed writing|\bunexpected pos \d"
)


class NoRoomError(UserError):
    """A disk is full, or what may be written to it is limited; the message says where, and how much is free."""


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was caused by, says that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if not isinstance(error, UserError) and _TEXTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def room_for(place: Path, need: int | None = None, written: Path | None = None) -> Iterator[None]:
    """Turn what is raised when a file or folder does not fit on its disk into one sentence.

    Args:
        place: What is written.
        need: Its size in bytes, where that is known.
        written: Where it is written first, so that it appears whole.

    Raises:
        NoRoomError: It does not fit.
    """
    try:
        yield
    except NoRoomError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise NoRoomError(no_room(place, need, error, written)) from error


def no_room(place: Path, need: int | None, error: BaseException, written: Path | None = None) -> str:
    """Say that something does not fit.

    Args:
        place: What is written, whole or in part.
        need: Its size in bytes; `None` where only what is there of it can be told.
        error: What was raised.
        written: What is there of it, when it is first written somewhere else.
    """
    limited = os.strerror(errno.EFBIG) in str(error) or "disk I/O" in str(error)
    reason = "files may not be so large here (`ulimit -f`, or a limit of the disk)" if limited else "the disk is full"
    amount = (
        f"{size_text(need)} are needed"
        if need is not None
        else f"{size_text(bytes_in(written or place))} of it were written"
    )
    return (
        f"{place} cannot be written, {reason}: {amount}, {size_text(free_bytes(place))} are free there. Make room, and "
        "run the same command again"
    )


def free_bytes(place: Path) -> int:
    """Return what is free where a file or folder is, or is to be."""
    there = next((path for path in (place, *place.absolute().parents) if path.exists()), Path.cwd())
    return shutil.disk_usage(there).free


def size_text(size: int) -> str:
    """Return a number of bytes in a unit in which it is not 0.0."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"


def bytes_in(place: Path) -> int:
    """Return the size of a file, or of all files in a folder; 0 where there is nothing."""
    files = place.rglob("*") if place.is_dir() else [place]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total

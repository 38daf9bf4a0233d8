"""Files that appear whole: written beside their place, and moved there when they are complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qvl_pipeline.storage.room import room_for


@contextlib.contextmanager
def whole(path: Path, need: int | None = None) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` in the end; nothing changes there when writing fails.

    Args:
        path: The file. Its folder is made when missing.
        need: Its size in bytes, where that is known, for the sentence about a full disk.

    Raises:
        NoRoomError: There is no room for it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with room_for(path, need, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text, in UTF-8, so that it appears whole.

    Raises:
        NoRoomError: There is no room for it.
    """
    content = text.encode()
    with whole(path, len(content)) as partial:
        partial.write_bytes(content)

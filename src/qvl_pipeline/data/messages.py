"""The canonical form of a message and of a medium in it, as `samples` has them."""

from __future__ import annotations

from typing import Any, NamedTuple

Message = dict[str, Any]


class Media(NamedTuple):
    """One use of a media file.

    Attributes:
        type: `image`, `video` or `audio`.
        path: Path of the file; while a row is read, also a URL or the content itself (bytes, or a data URL).
        start: First second used of a clip or sound; `None` is its beginning.
        end: Last second used; `None` is its end.
    """

    type: str
    path: str | bytes
    start: float | None = None
    end: float | None = None

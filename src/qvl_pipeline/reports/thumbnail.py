"""What a page shows of an image or of a frame."""

from __future__ import annotations

from typing import NamedTuple


class Thumbnail(NamedTuple):
    """A picture and the line below it.

    Attributes:
        uri: Picture as a data URI, or nothing when there is no picture.
        caption: Text below the picture.
    """

    uri: str | None
    caption: str

"""A picture as a data URI that a page can hold."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from qvl_pipeline.media.pixels import open_image

SIDE = 112  # pixels: twice the size on the page, for sharp screens


def image_uri(path: str) -> str:
    """Make a small picture of an image file, as a data URI."""
    return png_uri(Image.fromarray(open_image(Path(path)).transpose(1, 2, 0)))


def png_uri(image: Image.Image) -> str:
    """Shrink an image to at most `SIDE` pixels a side and encode it as a data URI."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

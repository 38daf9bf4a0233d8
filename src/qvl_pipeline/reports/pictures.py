"""Pictures as data URIs that a page can hold: small enough to be sent, large enough to be read."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from qvl_pipeline.media.pixels import open_image

# Pixels of the longer side. The labels of a chart can still be read; a page of a hundred such pictures is a few MB.
SIDE, FRAME_SIDE = 896, 384
# Drawings of so few pixels are kept as they are.
LOSSLESS_SIDE = 160


def image_uri(path: str, side: int = SIDE) -> str:
    """Make a picture of an image file, as a data URI."""
    return picture_uri(Image.fromarray(open_image(Path(path)).transpose(1, 2, 0)), side)


def picture_uri(image: Image.Image, side: int = SIDE) -> str:
    """Shrink an image to at most `side` pixels a side and encode it as a data URI: WebP, or PNG of a very small one."""
    small = image.copy()
    small.thumbnail((side, side))
    lossless = max(small.size) <= LOSSLESS_SIDE
    buffer = io.BytesIO()
    if lossless:
        small.save(buffer, format="PNG", optimize=True)
    else:
        small.save(buffer, format="WEBP", quality=80, method=4)
    kind = "png" if lossless else "webp"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

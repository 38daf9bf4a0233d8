"""What most pictures are, upright and of three colours of eight bits, decoded to Pillow's pixels in less time."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision.io import ImageReadMode, decode_jpeg

from qvl_pipeline.media.opening import OpenMedia

# Bytes that a file may have beside its pixels: profile, preview, notes of a camera.
_BESIDE_PIXELS = 1 << 20
# How the texts of a PNG begin that can say that it is to be turned, as can a chunk of its own, `eXIf`.
_TURNING_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")


def decode_picture(file: OpenMedia, image: Image.Image) -> np.ndarray | None:
    """Decode a JPEG by torchvision, which has Pillow's library but not its copies, or a PNG as below.

    Args:
        file: The open file.
        image: The same, opened by Pillow, which has read no pixels yet.

    Returns:
        Uint8 `[3, H, W]`, in which the channels of a pixel lie together. `None` for all other pictures, and for what is
        damaged: Pillow says in which way.
    """
    if image.mode != "RGB" or image.format not in ("JPEG", "PNG"):
        return None
    if file.size > image.width * image.height * 3 + _BESIDE_PIXELS:  # it would be read whole, with whatever follows it
        return None
    if image.format == "PNG":
        data = Path(file).read_bytes()
        if image.has_transparency_data or _may_be_turned(data):
            return None
        return decode_png(data, image.height, image.width)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    with contextlib.suppress(RuntimeError):
        return decode_jpeg(torch.from_numpy(np.fromfile(file, dtype=np.uint8)), ImageReadMode.RGB).numpy()
    return None


def _may_be_turned(png: bytes) -> bool:
    """Whether it has metadata that can turn it. Pillow would decode the pixels to know, as they may come behind."""
    start = 8
    while start + 8 <= len(png):
        length, name = struct.unpack_from(">I4s", png, start)
        if name == b"eXIf" or (name in (b"tEXt", b"zTXt", b"iTXt") and png.startswith(_TURNING_TEXTS, start + 8)):
            return True
        start += length + 12
    return False


def decode_png(data: bytes, height: int, width: int) -> np.ndarray | None:
    """Decode a PNG by kornia-rs (the `png` crate), in little more than a third of Pillow's time.

    Args:
        data: The file.
        height: Its height in pixels.
        width: Its width in pixels.

    Returns:
        Uint8 `[3, H, W]`, in which the channels of a pixel lie together. `None` where it has other than three colours
        of eight bits, or is damaged.
    """
    from kornia_rs.io import decode_image_png_u8  # a GPU node that loads no PNG can do without

    with contextlib.suppress(Exception):  # it has no class of its own for what it raises
        return decode_image_png_u8(data, (height, width), "rgb").transpose(2, 0, 1)
    return None

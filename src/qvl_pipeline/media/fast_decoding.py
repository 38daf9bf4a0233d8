"""Fast decoders of the most common pictures, upright RGB of eight bits a colour, with exactly Pillow's pixels."""

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
# Chunks of a PNG before its pixels that change nothing of what Pillow makes of them.
_PLAIN_CHUNKS = {b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"sBIT", b"bKGD", b"tIME", b"cICP"}
# Texts of a PNG that can say that it is to be turned.
_TURNING_TEXTS = (b"Raw profile", b"XML:")


def decode_picture(file: OpenMedia, image: Image.Image) -> np.ndarray | None:
    """Decode a JPEG by torchvision, which has Pillow's library but not its copies, or a PNG by `decode_png`.

    Args:
        file: The open file.
        image: The same, opened by Pillow, which has read no pixels yet.

    Returns:
        Uint8 `[3, H, W]`, in which the channels of a pixel lie together. `None` leaves it to Pillow: for all other
        pictures, and for damaged ones, of which Pillow says what is wrong.
    """
    if image.mode != "RGB" or image.format not in ("JPEG", "PNG"):
        return None
    if file.size > image.width * image.height * 3 + _BESIDE_PIXELS:  # it would be read whole, with whatever follows it
        return None
    if image.format == "PNG":
        data = Path(file).read_bytes()
        return decode_png(data, image.height, image.width) if _is_plain(data) else None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    with contextlib.suppress(RuntimeError):
        return decode_jpeg(torch.from_numpy(np.fromfile(file, dtype=np.uint8)), ImageReadMode.RGB).numpy()
    return None


def _is_plain(png: bytes) -> bool:
    """Whether its chunks are whole, and none can turn it, make it transparent, or be refused by Pillow.

    Those behind the pixels count as well, so Pillow would have to decode these to know.
    """
    start, pixels = 8, False
    while start + 12 <= len(png):
        length, name = struct.unpack_from(">I4s", png, start)
        if (name == b"IHDR") != (start == 8) or (name == b"IHDR" and length != 13):
            return False
        if name == b"IEND":
            return True
        if name == b"tEXt":
            keyword = png[start + 8 : start + 8 + min(length, 80)].split(b"\0")[0]
            # Pillow keeps texts beside what it knows of a picture, all of whose names are in small letters.
            if not (keyword[:1].isupper() or b":" in keyword) or keyword.startswith(_TURNING_TEXTS):
                return False
        elif name not in (b"IHDR", b"IDAT", b"tIME") and (pixels or name not in _PLAIN_CHUNKS):
            return False
        pixels |= name == b"IDAT"
        start += length + 12
    return False


def decode_png(data: bytes, height: int, width: int) -> np.ndarray | None:
    """Decode a PNG by kornia-rs (the `png` crate), in little more than a third of Pillow's time.

    It checks each chunk's CRC as Pillow does, but not the Adler-32 of all pixels. It holds the GIL meanwhile.

    Args:
        data: The file.
        height: Its height in pixels.
        width: Its width in pixels.

    Returns:
        Uint8 `[3, H, W]`, in which the channels of a pixel lie together. `None` leaves it to Pillow: what has other
        than three colours of eight bits, what is damaged, and everything where kornia-rs is not installed.
    """
    with contextlib.suppress(Exception):  # it has no class of its own for what it raises
        from kornia_rs.io import decode_image_png_u8

        return decode_image_png_u8(data, (height, width), "rgb").transpose(2, 0, 1)
    return None

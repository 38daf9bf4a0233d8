"""The bytes that a frame is stored as: four encodings, of which only `jpeg` changes pixels."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.fast_decoding import decode_png

# Higher levels take several times as long to write and save nothing: what is left of filtered frames is noise.
_ZSTD_LEVEL = 1
# Level 3 takes half the time of level 6, the default, for an eighth more bytes; level 1 gains no time on frames.
_PNG_LEVEL = 3


def encode_frame(frame: np.ndarray, encoding: str, jpeg_quality: int) -> bytes:
    """Encode one frame.

    Args:
        frame: Uint8 `[3, H, W]`.
        encoding: `raw`, `zstd` or `png`, all lossless, or `jpeg`.
        jpeg_quality: Quality of `jpeg`, 1 to 100.

    Returns:
        The encoded bytes; `raw` is the memory of the contiguous frame.
    """
    if encoding == "raw":
        return frame.tobytes()
    if encoding == "zstd":
        return pa.Codec("zstd", compression_level=_ZSTD_LEVEL).compress(_filtered(frame), asbytes=True)
    buffer = io.BytesIO()
    options = {"png": {"compress_level": _PNG_LEVEL}, "jpeg": {"quality": jpeg_quality}}[encoding]
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(buffer, format=encoding, **options)
    return buffer.getvalue()


def decode_frame(data: pa.Buffer, encoding: str, out: np.ndarray) -> None:
    """Decode one frame.

    Args:
        data: What `encode_frame` returned.
        encoding: The encoding, but for `raw`: there is nothing to decode.
        out: Where to write, uint8 `[3, H, W]`.

    Raises:
        UserError: There is no such encoding.
    """
    if encoding == "zstd":
        _unfilter(pa.decompress(data, decompressed_size=out.nbytes, codec="zstd"), out)
    elif encoding == "png" and (picture := decode_png(data.to_pybytes(), *out.shape[1:])) is not None:
        out[...] = picture
    elif encoding in ("png", "jpeg"):
        with Image.open(pa.BufferReader(data), formats=(encoding.upper(),)) as image:
            out[...] = np.asarray(image).transpose(2, 0, 1)
    else:
        raise UserError(
            f"stored frames are encoded as '{encoding}', which this version cannot read: run the pipeline 'sample' "
            "again, or update the project"
        )


def _filtered(frame: np.ndarray) -> np.ndarray:
    """Replace pixels by what their neighbours do not tell, uint8 `[H, 3, W]`, all sums modulo 256.

    Red and blue become their difference to green, and then every value the difference to the one above it and, of that,
    to the one on its left. (PNG chooses between such filters by row; a fixed one is undone by plain sums.)
    """
    rows = frame.transpose(1, 0, 2).copy()
    rows[:, ::2] -= rows[:, 1:2]
    rows[1:] -= rows[:-1]
    rows[..., 1:] -= rows[..., :-1]
    return rows


def _unfilter(data: pa.Buffer, out: np.ndarray) -> None:
    """Undo `_filtered` into `out`, uint8 `[3, H, W]`."""
    _, height, width = out.shape
    # torch's sum takes a seventh of the time of NumPy's.
    rows = torch.frombuffer(data, dtype=torch.uint8).view(height, 3, width).cumsum(-1, dtype=torch.uint8).numpy()
    for above, row in pairwise(rows):
        row += above
    out[...] = rows.transpose(1, 0, 2)
    out[::2] += out[1]

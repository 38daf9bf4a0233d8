"""Clips whose every frame shows its own number, as eight black or white bars."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd

from qvl_pipeline.media.frames.decoding import read_frame_table

SIZE = 64
BITS = 8


def picture_of(number: int, size: int = SIZE) -> np.ndarray:
    """RGB `[size, size, 3]` with the bits of `number`, lowest first, in eight vertical bars."""
    bits = (number >> np.arange(BITS)) & 1
    return np.broadcast_to(np.repeat(bits * 255, size // BITS).astype(np.uint8)[None, :, None], (size, size, 3))


def number_in(picture: np.ndarray) -> int:
    """Read the number that a picture `[H, W, 3]` shows."""
    bars = np.array_split(picture.mean(axis=(0, 2)), BITS)
    return int(sum((bar.mean() > 127) << bit for bit, bar in enumerate(bars)))


def write_clip(
    path: Path,
    seconds: Sequence[float],
    *,
    codec: str = "libx264",
    b_frames: int = 0,
    gop: int = 12,
    time_base: Fraction = Fraction(1, 90_000),
    rate: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode a clip whose frame `i` shows `i` and is presented at `seconds[i]`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate or Fraction(1) / time_base, options=options or {})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for number, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_of(number)), format="rgb24")
            frame.pts, frame.time_base = round(second / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate_mp4(path: Path, quarter_turns_clockwise: int) -> None:
    """Write a display rotation into the track header of an mp4 file, as a telephone held upright does."""
    matrices = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}
    a, b, c, d = matrices[quarter_turns_clockwise]
    fixed = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    matrix = header + (40 if data[header] == 0 else 52)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in fixed)
    path.write_bytes(data)


def index_clips(paths: Iterable[Path]) -> pd.DataFrame:
    """The table `media_index` of clips of this module."""
    rows = []
    for path in paths:
        table = read_frame_table(str(path))
        facts = {"n_frames": len(table.seconds), "fps": table.fps, "height": SIZE, "width": SIZE}
        content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append({"path": str(path), "type": "video", "content_hash": content_hash, **facts})
    return pd.DataFrame(rows)

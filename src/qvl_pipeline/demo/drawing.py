"""Draws scikit-learn's handwritten digits into pictures and clips."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

CANVAS = 64  # pixels a side, of pictures and clips
CLIP_FRAMES = 8
CLIP_FPS = 4
STILL_SIZES = (52, 60)  # smallest and largest side of a digit in pictures and sequences
MOVING_SIZE = 48
# A constant quantiser: x264's default rate control (macroblock tree) gave other bytes now and then for the same clip.
ENCODER = {"preset": "veryfast", "qp": "20", "threads": "1"}


def draw_picture(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Draw one digit, nearly filling the canvas, over a dark background.

    Args:
        rng: Source of the background, the size and the place.
        digit: Ink of 0 to 16, `[8, 8]`.

    Returns:
        RGB picture, uint8 `[64, 64, 3]`.
    """
    return _still(rng, _background(rng), digit)


def draw_sequence(rng: np.random.Generator, digits: list[np.ndarray]) -> np.ndarray:
    """Draw digits that follow one another over one background, each for an equal share of the clip.

    Args:
        rng: Source of the background, the sizes and the places.
        digits: Digits in order of appearance, each `[8, 8]`.

    Returns:
        Frames, uint8 `[8, 64, 64, 3]`.
    """
    background = _background(rng)
    pictures = [_still(rng, background, digit) for digit in digits]
    return np.stack([pictures[frame * len(pictures) // CLIP_FRAMES] for frame in range(CLIP_FRAMES)])


def draw_motion(rng: np.random.Generator, digit: np.ndarray, direction: str) -> np.ndarray:
    """Draw one digit that crosses the canvas steadily, from one side to the other.

    The same frames in reverse order show the opposite direction, so no single frame tells it.

    Args:
        rng: Source of the background and of the place across the direction.
        digit: The digit, `[8, 8]`.
        direction: `left`, `right`, `up` or `down`.

    Returns:
        Frames, uint8 `[8, 64, 64, 3]`.
    """
    background = _background(rng)
    room = CANVAS - MOVING_SIZE
    across = int(rng.integers(0, room + 1))
    along = np.linspace(0, room, CLIP_FRAMES).round().astype(int)
    if direction in ("left", "up"):
        along = along[::-1]
    corners = [(across, place) if direction in ("left", "right") else (place, across) for place in along]
    return np.stack([_blend(background, _ink(digit, MOVING_SIZE, *corner)) for corner in corners])


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encode frames as H.264 yuv420p in an mp4 file; single-threaded, so the bytes are reproducible.

    Args:
        path: File to write.
        frames: RGB frames, uint8 `[T, H, W, 3]`.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS, options=ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture, uint8 `[H, W, 3]`, as PNG."""
    Image.fromarray(picture).save(path, format="PNG")


def _still(rng: np.random.Generator, background: np.ndarray, digit: np.ndarray) -> np.ndarray:
    size = int(rng.integers(STILL_SIZES[0], STILL_SIZES[1], endpoint=True))
    row, column = rng.integers(0, CANVAS - size, size=2, endpoint=True)
    return _blend(background, _ink(digit, size, row, column))


def _ink(digit: np.ndarray, size: int, row: int, column: int) -> np.ndarray:
    """Opacity of 0 to 1, `[64, 64, 1]`, of a digit scaled to `size` pixels with its corner at (row, column)."""
    scaled = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    ink = np.zeros((CANVAS, CANVAS, 1), dtype=np.float32)
    ink[row : row + size, column : column + size, 0] = np.asarray(scaled, dtype=np.float32) / 255
    return ink


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dark colour that fades into another from left to right, float32 `[64, 64, 3]` in 0 to 255."""
    near, far = rng.uniform(0, 90, size=(2, 3)).astype(np.float32)
    fade = np.linspace(0, 1, CANVAS, dtype=np.float32)[None, :, None]
    return np.broadcast_to(near * (1 - fade) + far * fade, (CANVAS, CANVAS, 3))


def _blend(background: np.ndarray, ink: np.ndarray) -> np.ndarray:
    return (background * (1 - ink) + 245 * ink).round().astype(np.uint8)

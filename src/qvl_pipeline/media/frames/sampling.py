"""Which frames of a clip the model sees, and at which size: the rules of `qwen_vl_utils` 0.0.14 as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from qvl_pipeline.families.family import MERGE_SIZE

# Qwen-VL merges frames in pairs.
FRAME_FACTOR = 2
# qwen_vl_utils' VIDEO_MAX_TOKEN_NUM: most merged tokens of one frame, whatever `max_pixels` says.
MAX_FRAME_TOKENS = 768
MAX_RATIO = 200
# A frame's share of the budget of its clip is never less than so many times `min_pixels`.
SHARE_FLOOR = 1.05


def smart_nframes(
    n_frames: int, source_fps: float, *, strategy: str, fps: float, frame_num: int, min_frames: int, max_frames: int
) -> int:
    """Count the frames to sample (`qwen_vl_utils.smart_nframes`).

    Args:
        n_frames: Frames that there are.
        source_fps: Their rate.
        strategy: `fps` or `frame_num`.
        fps: Frames to sample per second.
        frame_num: Frames to sample with the strategy `frame_num`.
        min_frames: Fewest frames, for `fps`.
        max_frames: Most frames, for `fps`.

    Returns:
        An even number between 2 and `n_frames`.

    Raises:
        ValueError: There are too few frames.
    """
    if strategy == "frame_num":
        wanted = round(frame_num / FRAME_FACTOR) * FRAME_FACTOR
    else:
        fewest = math.ceil(min_frames / FRAME_FACTOR) * FRAME_FACTOR
        most = math.floor(max_frames / FRAME_FACTOR) * FRAME_FACTOR
        number = min(max(n_frames / source_fps * fps, fewest), most, n_frames)
        wanted = math.floor(number / FRAME_FACTOR) * FRAME_FACTOR
    if not FRAME_FACTOR <= wanted <= n_frames:
        raise ValueError(f"{wanted} frames are to be sampled, but there are {n_frames}, and at least 2 are needed")
    return wanted


def frame_range(seconds: np.ndarray, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """Find the first and last frame of a part of a clip (`qwen_vl_utils.calculate_video_frame_range`).

    Where frame *i* is not shown at *i / fps* (variable frame rate, a late start), the true times decide.

    Args:
        seconds: Presentation time of every frame, ascending `[N]`.
        fps: Mean frame rate.
        start: First second, or `None`.
        end: Last second, or `None`.

    Returns:
        Numbers of the first and the last frame, both inclusive.

    Raises:
        ValueError: Fewer than two frames lie in between.
    """
    last = len(seconds) - 1
    if is_regular(seconds, fps):
        duration = len(seconds) / fps
        first_frame = 0 if start is None else math.ceil(min(max(start, 0.0), duration) * fps)
        last_frame = last if end is None else min(math.floor(min(max(end, 0.0), duration) * fps), last)
    else:
        first_frame = 0 if start is None else int(np.searchsorted(seconds, start, side="left"))
        last_frame = last if end is None else int(np.searchsorted(seconds, end, side="right")) - 1
    if (start is not None or end is not None) and first_frame >= last_frame:
        raise ValueError(f"fewer than two frames lie between second {start} and second {end}")
    return first_frame, last_frame


def spread_frames(seconds: np.ndarray, fps: float, first: int, last: int, count: int) -> list[int]:
    """Spread frames evenly over a clip.

    At a constant frame rate these are `qwen_vl_utils`' frames, spread over frame numbers. At a variable rate that would
    crowd them into the parts with many frames, and Qwen2.5-VL, which is told one interval for the whole clip, would
    misplace them by seconds: there they are spread over time, and each is the one on screen at its moment.

    Args:
        seconds: Presentation time of every frame, ascending `[N]`.
        fps: Mean frame rate.
        first: First frame that may be taken.
        last: Last frame that may be taken.
        count: Frames to take.

    Returns:
        `count` frame numbers, ascending; where the source shows one frame for long, it is repeated.
    """
    if is_regular(seconds, fps):
        # torch's float32 linspace, because its rounding of ties is part of the rule.
        return torch.linspace(first, last, count).round().long().tolist()
    moments = np.linspace(seconds[first], seconds[last], count)
    return (np.searchsorted(seconds, moments, side="right") - 1).tolist()


def rate_within(seconds: np.ndarray, fps: float, first: int, last: int) -> float:
    """Frame rate between two frames: the mean rate, unless the rate varies."""
    if is_regular(seconds, fps):
        return fps
    return float((last - first) / (seconds[last] - seconds[first]))


def is_regular(seconds: np.ndarray, fps: float) -> bool:
    """Whether each frame *i* is shown within half a frame of *i / fps*."""
    return bool(np.abs(seconds * fps - np.arange(len(seconds))).max() < 0.5)


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """Fit a picture to a pixel budget (`qwen_vl_utils.smart_resize`).

    Args:
        height: Height in pixels.
        width: Width in pixels.
        factor: Both sides become multiples of it.
        min_pixels: Fewest pixels.
        max_pixels: Most pixels.

    Returns:
        Height and width.

    Raises:
        ValueError: The picture is so elongated that it cannot fit: qwen_vl_utils fails there, or returns a side of 0.
    """
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise ValueError(f"a frame of {height} x {width} pixels is too elongated: at most 1:{MAX_RATIO}")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height, new_width = (math.floor(side / shrink / factor) * factor for side in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    if min(new_height, new_width) == 0:
        raise ValueError(f"a frame of {height} x {width} pixels does not fit into {max_pixels:.0f} pixels")
    return new_height, new_width


def video_size(
    n_frames: int, height: int, width: int, *, patch_size: int, min_pixels: int, max_pixels: int, total_pixels: int
) -> tuple[int, int]:
    """Size of the frames of a clip, so that all of them together keep to the pixel budget (`fetch_video`).

    Args:
        n_frames: Frames sampled.
        height: Source height in pixels.
        width: Source width in pixels.
        patch_size: Side of a vision patch in pixels.
        min_pixels: Fewest pixels per frame.
        max_pixels: Most pixels per frame.
        total_pixels: Most pixels of all frames; two frames share one temporal patch, so each may have twice its share.

    Returns:
        Height and width, multiples of `2 * patch_size`.

    Raises:
        ValueError: The frames are too elongated.
    """
    factor = patch_size * MERGE_SIZE
    budget = {"min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
    limit = frame_limit(n_frames, factor=factor, **budget)
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=limit)


def frame_limit(n_frames: int, *, factor: int, min_pixels: int, max_pixels: int, total_pixels: int) -> float:
    """Most pixels of a frame of a clip.

    Args:
        n_frames: Frames sampled.
        factor: Side of a merged patch in pixels.
        min_pixels: Fewest pixels per frame; its share of the clip does not fall below.
        max_pixels: Most pixels per frame.
        total_pixels: Most pixels of all frames; two frames share one temporal patch, so each may have twice its share.
    """
    share = min(MAX_FRAME_TOKENS * factor**2, total_pixels / n_frames * FRAME_FACTOR)
    return min(max_pixels, max(share, int(min_pixels * SHARE_FLOOR)))


def seconds_per_grid(seconds: Sequence[float], temporal_patch_size: int = FRAME_FACTOR) -> float:
    """Mean time between two temporal patches, from the true times of the sampled frames `[T]`."""
    return temporal_patch_size * (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)


def told_seconds_per_grid(
    indices: Sequence[int], seconds: Sequence[float], fps: float, temporal_patch_size: int = FRAME_FACTOR
) -> float:
    """Time of a temporal patch as Qwen2.5-VL is told it, by the formula that its training and all engines have.

    That is the temporal patch over the sampled rate, which is the share of the clip's frames that was taken times their
    rate (transformers' `VideoMetadata.sampled_fps`, qwen_vl_utils' `sample_fps`). The frames themselves, which are
    spread from the first to the last, lie further apart: by 14 % if they are 8, by 33 % if 4. Where the frame rate
    varies, that share says nothing of time, and the true interval is told.

    Args:
        indices: Number of each sampled frame in the source `[T]`; the first and the last are those of the clip.
        seconds: Its true time `[T]`.
        fps: Mean frame rate of the source.
        temporal_patch_size: Frames in a temporal patch.
    """
    shown = np.asarray(seconds) - seconds[0]
    expected = np.asarray(indices) - indices[0]
    if np.abs(shown * fps - expected).max() >= 0.5:
        return seconds_per_grid(seconds, temporal_patch_size)
    frames = indices[-1] - indices[0] + 1
    return temporal_patch_size / (len(indices) / frames * fps)

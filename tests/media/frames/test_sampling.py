from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen_vl_utils import vision_process as reference
from transformers.video_utils import VideoMetadata

from qvl_pipeline.media.frames import sampling

RATES = st.sampled_from([1.0, 5.0, 12.5, 24000 / 1001, 25.0, 30000 / 1001, 30.0, 60.0]) | st.floats(0.5, 120)
PATCH_SIZES = st.sampled_from([14, 16])


def regular_seconds(n_frames: int, fps: float) -> np.ndarray:
    return np.arange(n_frames) / fps


@settings(max_examples=400, deadline=None)
@given(
    n_frames=st.integers(1, 5000),
    source_fps=RATES,
    fps=st.floats(0.05, 60),
    limits=st.tuples(st.integers(2, 64), st.integers(0, 800)),
)
def test_the_number_of_frames_at_a_rate_is_that_of_qwen_vl_utils(
    n_frames: int, source_fps: float, fps: float, limits: tuple[int, int]
) -> None:
    fewest, most = limits[0], sum(limits)
    element = {"fps": fps, "min_frames": fewest, "max_frames": most}
    ours = {"strategy": "fps", "fps": fps, "frame_num": 0, "min_frames": fewest, "max_frames": most}
    compare(
        lambda: reference.smart_nframes(element, n_frames, source_fps),
        lambda: sampling.smart_nframes(n_frames, source_fps, **ours),
    )


@settings(max_examples=200, deadline=None)
@given(n_frames=st.integers(1, 300), frame_num=st.integers(1, 300))
def test_a_fixed_number_of_frames_is_that_of_qwen_vl_utils(n_frames: int, frame_num: int) -> None:
    ours = {"strategy": "frame_num", "fps": 0.0, "frame_num": frame_num, "min_frames": 4, "max_frames": 8}
    compare(
        lambda: reference.smart_nframes({"nframes": frame_num}, n_frames, 30.0),
        lambda: sampling.smart_nframes(n_frames, 30.0, **ours),
    )


SECONDS = st.none() | st.floats(-1, 200) | st.integers(0, 300).map(lambda tenths: tenths / 10)


@settings(max_examples=400, deadline=None)
@given(n_frames=st.integers(2, 5000), fps=RATES, start=SECONDS, end=SECONDS)
def test_the_range_of_a_sub_clip_is_that_of_qwen_vl_utils(
    n_frames: int, fps: float, start: float | None, end: float | None
) -> None:
    element = {"video_start": start, "video_end": end}
    compare(
        lambda: reference.calculate_video_frame_range(element, n_frames, fps)[:2],
        lambda: sampling.frame_range(regular_seconds(n_frames, fps), fps, start, end),
    )


@settings(max_examples=300, deadline=None)
@given(first=st.integers(0, 20_000), length=st.integers(2, 100_000), count=st.integers(1, 400))
def test_frames_are_spread_as_qwen_vl_utils_spreads_them(first: int, length: int, count: int) -> None:
    count = min(2 * count, length)
    expected = torch.linspace(first, first + length - 1, count).round().long().tolist()
    seconds = regular_seconds(first + length, 30.0)
    assert sampling.spread_frames(seconds, 30.0, first, first + length - 1, count) == expected


# More pixels than 768 tokens, and a budget that is smaller than two frames of the fewest pixels.
@example(size=(1080, 1920), n_frames=8, patch_size=16, limits=(1000, 2_000_000), total_pixels=10**10)
@example(size=(1080, 1920), n_frames=8, patch_size=14, limits=(200_000, 900_000), total_pixels=1000)
@settings(max_examples=400, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    n_frames=st.integers(1, 400).map(lambda half: 2 * half),
    patch_size=PATCH_SIZES,
    limits=st.tuples(st.integers(1, 300_000), st.integers(0, 1_000_000)),
    total_pixels=st.integers(1, 100_000_000) | st.just(10**10),
)
def test_the_size_of_frames_is_that_of_qwen_vl_utils(
    size: tuple[int, int], n_frames: int, patch_size: int, limits: tuple[int, int], total_pixels: int
) -> None:
    min_pixels, max_pixels = limits[0], sum(limits)
    element = {"min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
    budget = {"min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
    compare(
        lambda: reference_size(n_frames, size, patch_size, element),
        lambda: sampling.video_size(n_frames, *size, patch_size=patch_size, **budget),
    )


def reference_size(n_frames: int, size: tuple[int, int], patch_size: int, element: dict[str, int]) -> tuple[int, int]:
    """Let `fetch_video` size frames that are not there: it only asks for their shape."""

    class Frames:
        shape = (n_frames, 3, *size)

    chosen: list[list[int]] = []

    def resize(_: object, new_size: list[int], **__: object) -> torch.Tensor:
        chosen.append(new_size)
        return torch.zeros(1)

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(reference.transforms.functional, "resize", resize)
        patch.setitem(reference.VIDEO_READER_BACKENDS, "torchvision", lambda _: (Frames, {}, 1.0))
        patch.setattr(reference, "get_video_reader_backend", lambda: "torchvision")
        reference.fetch_video({"video": "clip.mp4", **element}, image_patch_size=patch_size)
    height, width = chosen[0]
    if 0 in (height, width):
        raise ValueError("qwen_vl_utils would resize to nothing")
    return height, width


def compare(theirs, ours) -> None:
    """Both give the same, or both refuse."""
    try:
        expected = theirs()
    except ValueError:
        with pytest.raises(ValueError, match="frame"):
            ours()
        return
    assert ours() == expected


# A variable frame rate: 10 frames a second for 3 s, then one frame a second for 12 s.
IRREGULAR = np.concatenate([np.arange(30) / 10, 3 + np.arange(12)])
MEAN_FPS = 41 / IRREGULAR[-1]


def test_a_sub_clip_of_variable_rate_is_bounded_by_true_seconds() -> None:
    first, last = sampling.frame_range(IRREGULAR, MEAN_FPS, 2.5, 8.2)
    assert (IRREGULAR[first], IRREGULAR[last]) == (2.5, 8.0)


def test_the_rate_within_a_part_is_that_of_the_part_when_it_varies() -> None:
    assert sampling.rate_within(IRREGULAR, MEAN_FPS, 0, 20) == pytest.approx(10)
    assert sampling.rate_within(IRREGULAR, MEAN_FPS, 32, 40) == pytest.approx(1)
    assert sampling.rate_within(regular_seconds(100, 29.97), 29.97, 3, 50) == 29.97


@pytest.mark.parametrize("count", [4, 8, 16])
def test_frames_of_variable_rate_are_spread_over_time(count: int) -> None:
    indices = sampling.spread_frames(IRREGULAR, MEAN_FPS, 0, len(IRREGULAR) - 1, count)
    moments = np.linspace(0, IRREGULAR[-1], count)
    until = np.append(IRREGULAR[1:], np.inf)
    assert len(indices) == count
    assert all(IRREGULAR[i] <= moment < until[i] for i, moment in zip(indices, moments, strict=True))


@pytest.mark.parametrize(
    ("seconds", "fps"),
    [(regular_seconds(3000, 30000 / 1001), 30000 / 1001), (regular_seconds(40, 10.0), 10.0), (IRREGULAR, MEAN_FPS)],
    ids=["ntsc", "short", "variable"],
)
def test_one_interval_places_every_temporal_patch_within_one_sampled_frame(seconds: np.ndarray, fps: float) -> None:
    """What Qwen2.5-VL is told: patch k is shown k intervals after the first one."""
    for count in (4, 8, 16, 32):
        indices = sampling.spread_frames(seconds, fps, 0, len(seconds) - 1, count)
        sampled = seconds[indices]
        true = sampled.reshape(-1, 2).mean(axis=1)
        told = true[0] + np.arange(count // 2) * sampling.seconds_per_grid(sampled.tolist())
        longest_shown = max(np.diff(seconds))
        assert np.abs(told - true).max() <= max(longest_shown, 1 / fps)


def test_the_interval_is_that_of_qwen_processors_where_sampling_is_even() -> None:
    # 2 frames a second out of 4: temporal patches lie one second apart.
    assert sampling.seconds_per_grid([0.0, 0.5, 1.0, 1.5]) == 1.0
    assert sampling.seconds_per_grid([3.0]) == 0.0


@pytest.mark.parametrize(("start", "end"), [(None, None), (3.2, 11.7)], ids=["whole", "part"])
@pytest.mark.parametrize(("total", "fps"), [(90, 30.0), (601, 30000 / 1001), (52, 12.5)])
def test_qwen2_5_vl_is_told_the_interval_of_the_official_formula(
    total: int, fps: float, start: float | None, end: float | None
) -> None:
    """Temporal patch over sampled rate; what qwen_vl_utils counts as the frames of a part is its part of the file."""
    if end is not None and end > total / fps:
        start, end = 0.7, 2.1
    seconds = regular_seconds(total, fps)
    first, last = sampling.frame_range(seconds, fps, start, end)
    for count in (2, 4, 8):
        indices = sampling.spread_frames(seconds, fps, first, last, count)
        told = sampling.told_seconds_per_grid(indices, seconds[indices].tolist(), fps)
        part = {"video_start": start, "video_end": end}
        item = {key: value for key, value in part.items() if value is not None}
        *_, frames = reference.calculate_video_frame_range(item, total, fps)
        sampled = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=indices)
        assert told == 2 / sampled.sampled_fps
        true = sampling.seconds_per_grid(seconds[indices].tolist())
        assert told / true == pytest.approx(frames / (frames - 1) * (count - 1) / count)


def test_qwen2_5_vl_is_told_the_true_interval_of_frames_of_variable_rate() -> None:
    indices = sampling.spread_frames(IRREGULAR, MEAN_FPS, 0, len(IRREGULAR) - 1, 8)
    seconds = IRREGULAR[indices].tolist()
    assert sampling.told_seconds_per_grid(indices, seconds, MEAN_FPS) == sampling.seconds_per_grid(seconds)


def test_a_late_start_is_no_variable_rate() -> None:
    seconds = regular_seconds(90, 30.0)
    indices = sampling.spread_frames(seconds, 30.0, 0, 89, 8)
    told = [sampling.told_seconds_per_grid(indices, (seconds[indices] + late).tolist(), 30.0) for late in (0.0, 5.0)]
    assert told[0] == told[1]


def test_total_budget_is_kept_by_all_frames_together() -> None:
    budget = {"min_pixels": 28 * 28, "max_pixels": 10**9, "total_pixels": 64 * 100 * 28 * 28}
    height, width = sampling.video_size(64, 1080, 1920, patch_size=14, **budget)
    # Two frames are one temporal patch: 64 frames have the tokens of 32 pictures.
    assert 32 * height * width <= budget["total_pixels"] < 32 * (height + 28) * (width + 28)
    assert math.isclose(height / width, 1080 / 1920, rel_tol=0.2)

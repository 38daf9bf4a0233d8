"""Nodes of the `sample` stage."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qvl_pipeline.config import ModelConfig, SampleConfig
from qvl_pipeline.data.progress import progress_bar
from qvl_pipeline.errors import UserError

if TYPE_CHECKING:
    from qvl_pipeline.media.frame_store import StoredClip

Clip = tuple[str, float | None, float | None]  # path, first second, last second


def sample_clips(
    valid_samples: pd.DataFrame, media_index: pd.DataFrame, sample: SampleConfig, model: ModelConfig
) -> Callable[[Path], None]:
    """Sample the frames of every clip that any sample refers to.

    Args:
        valid_samples: Samples whose media are valid.
        media_index: Every media file as probed.
        sample: Which frames, and at which size.
        model: Model whose patch size the frames must fit.

    Returns:
        A writer of the frame store.

    Raises:
        UserError: A clip is too short for the parameters, or the decoder cannot be loaded. Found before any decoding.
    """
    from qvl_pipeline.media.backends import choose_backend

    clips = list_clips(valid_samples)
    check_lengths(clips, media_index, sample)
    read = partial(read_clip, sample=sample, patch_size=model.patch_size, backend=choose_backend(sample.video_backend))
    return partial(_write_store, clips=clips, read=read)


def list_clips(valid_samples: pd.DataFrame) -> list[Clip]:
    """The different clips of all samples, in the order of their first appearance."""
    media = (item for items in valid_samples["media"] for item in items if item["type"] == "video")
    return list(dict.fromkeys((item["path"], item["start"], item["end"]) for item in media))


def check_lengths(clips: Iterable[Clip], media_index: pd.DataFrame, sample: SampleConfig) -> None:
    """Refuse files that are too short for the parameters.

    Parts of files are checked when they are read: how many frames lie between two seconds only the file can tell.

    Args:
        clips: Clips to sample.
        media_index: Every media file as probed.
        sample: Which frames are wanted.

    Raises:
        UserError: There are such files; the message counts them and names the first.
    """
    videos = media_index.loc[media_index["type"] == "video", ["path", "n_frames", "fps"]]
    files = {path: (n_frames, fps) for path, n_frames, fps in videos.itertuples(index=False)}
    problems = []
    for path, start, end in clips:
        if path not in files:
            raise UserError(f"video '{path}' is not in media_index: run the pipeline 'validate' again")
        if start is not None or end is not None:
            continue
        n_frames, fps = files[path]
        try:
            _count_frames(int(n_frames), fps, sample)
        except ValueError as error:
            problems.append(f"'{path}' ({error})")
    if problems:
        raise UserError(
            f"{len(problems)} clips are too short to be sampled like this, the first is {problems[0]}: raise "
            "validate.min_video_frames to quarantine them, or lower sample.frame_num"
        )


def read_clip(clip: Clip, *, sample: SampleConfig, patch_size: int, backend: str) -> StoredClip:
    """Sample one clip.

    Args:
        clip: Path, first and last second.
        sample: Which frames, at which size and encoding.
        patch_size: Side of a vision patch in pixels.
        backend: Decoder: `pyav` or `torchcodec`.

    Returns:
        The frames with their seconds, ready for the store.

    Raises:
        UserError: The clip cannot be sampled or decoded.
    """
    from qvl_pipeline.media.backends import decode_with
    from qvl_pipeline.media.decoding import read_frame_table
    from qvl_pipeline.media.frame_store import StoredClip, encode_frame
    from qvl_pipeline.media.pixels import resize
    from qvl_pipeline.media.sampling import video_size

    path, start, end = clip
    table = read_frame_table(path)
    frames: list[bytes] = []
    try:
        indices = _choose_frames(table.seconds, table.fps, start, end, sample)
        for frame in decode_with(backend, path, table, indices):
            if not frames:
                height, width = video_size(
                    len(indices),
                    *frame.shape[:2],
                    patch_size=patch_size,
                    min_pixels=sample.video_min_pixels,
                    max_pixels=sample.video_max_pixels,
                    total_pixels=sample.video_total_pixels,
                )
            picture = resize(frame.transpose(2, 0, 1).copy(), height, width)
            frames.append(encode_frame(picture, sample.frame_encoding, sample.jpeg_quality))
    except ValueError as error:
        raise UserError(f"clip '{path}' from {start} to {end} cannot be sampled: {error}") from error
    return StoredClip(
        path=path,
        start=start,
        end=end,
        height=height,
        width=width,
        source_fps=table.fps,
        encoding=sample.frame_encoding,
        frame_indices=indices,
        seconds=table.seconds[indices].tolist(),
        frames=frames,
    )


def _choose_frames(
    seconds: np.ndarray, fps: float, start: float | None, end: float | None, sample: SampleConfig
) -> list[int]:
    from qvl_pipeline.media.sampling import frame_range, rate_within, spread_frames

    first, last = frame_range(seconds, fps, start, end)
    count = _count_frames(last - first + 1, rate_within(seconds, fps, first, last), sample)
    return spread_frames(seconds, fps, first, last, count)


def _count_frames(n_frames: int, source_fps: float, sample: SampleConfig) -> int:
    from qvl_pipeline.media.sampling import smart_nframes

    return smart_nframes(
        n_frames,
        source_fps,
        strategy=sample.video_sampling_strategy,
        fps=sample.fps,
        frame_num=sample.frame_num,
        min_frames=sample.video_min_frames,
        max_frames=sample.video_max_frames,
    )


def _write_store(folder: Path, *, clips: list[Clip], read: Callable[[Clip], StoredClip]) -> None:
    from qvl_pipeline.media.frame_store import FrameStoreWriter

    workers = os.cpu_count() or 1
    with FrameStoreWriter(folder) as store, progress_bar() as bar, ThreadPoolExecutor(workers) as pool:
        for stored in bar.track(_in_order(pool, read, clips, window=2 * workers), len(clips), description="Clips"):
            store.add(stored)


def _in_order(
    pool: ThreadPoolExecutor, read: Callable[[Clip], StoredClip], clips: list[Clip], window: int
) -> Iterator[StoredClip]:
    """Read clips in parallel, yield them in order, and hold no more than `window` of them."""
    pending: deque[Future[StoredClip]] = deque()
    try:
        for clip in clips:
            pending.append(pool.submit(read, clip))
            if len(pending) == window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

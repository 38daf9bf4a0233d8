"""One clip: which of its frames, at which size, and reading them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qvl_pipeline.config import SampleConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.clips import resized_frames
from qvl_pipeline.media.frames.decode_worker import ClipError
from qvl_pipeline.media.frames.decoding import read_frame_table
from qvl_pipeline.media.frames.encoding import encode_frame
from qvl_pipeline.media.frames.sampling import frame_range, rate_within, smart_nframes, spread_frames, video_size
from qvl_pipeline.media.frames.store import StoredClip, clip_id
from qvl_pipeline.media.opening import ChangedMediaError, OpenMedia, open_media

# Changes when the same settings give other frames than they did.
RULES_VERSION = 2
# Of what these decide, the frames are made.
_DECISIVE = (
    "video_sampling_strategy",
    "fps",
    "frame_num",
    "video_min_frames",
    "video_max_frames",
    "video_min_pixels",
    "video_max_pixels",
    "video_total_pixels",
    "frame_encoding",
    "jpeg_quality",
)
# Bytes of a pixel of natural video; noise takes more.
_BYTES_PER_PIXEL = {"raw": 3.0, "zstd": 1.6, "png": 1.8, "jpeg": 0.6}


@dataclass(frozen=True)
class Clip:
    """A clip that samples refer to, with what the media index knows of its file.

    Attributes:
        path: Video file.
        start: First second, or `None`.
        end: Last second, or `None`.
        content_hash: Sha256 of the file.
        n_frames: Frames of the file.
        fps: Their mean rate.
        height: Height of the upright picture in pixels.
        width: Width of the upright picture in pixels.
    """

    path: str
    start: float | None
    end: float | None
    content_hash: str
    n_frames: int
    fps: float
    height: int
    width: int

    @property
    def name(self) -> str:
        """Its id in the frame store."""
        return clip_id(self.path, self.start, self.end)


def list_clips(valid_samples: pd.DataFrame, media_index: pd.DataFrame) -> list[Clip]:
    """The different clips of all samples, in the order of their first appearance.

    Args:
        valid_samples: Samples whose media are valid.
        media_index: Every media file as probed.

    Raises:
        UserError: A video is not in the media index.
    """
    columns = ["content_hash", "n_frames", "fps", "height", "width"]
    videos = media_index.loc[media_index["type"] == "video", ["path", *columns]].set_index("path")
    facts = videos.to_dict("index")
    media = (item for items in valid_samples["media"] for item in items if item["type"] == "video")
    clips = []
    for path, start, end in dict.fromkeys((item["path"], item["start"], item["end"]) for item in media):
        if path not in facts:
            raise UserError(f"video '{path}' is not in media_index: run the pipeline 'validate' again")
        clips.append(Clip(path, start, end, **facts[path]))
    return clips


def clip_key(clip: Clip, sample: SampleConfig, patch_size: int, backend: str) -> str:
    """Hash all that decides the frames of a clip: its content, not its name, and the rules."""
    rules = sample.model_dump(include=set(_DECISIVE))
    made_from = [RULES_VERSION, clip.content_hash, clip.start, clip.end, patch_size, backend, rules]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def estimated_bytes(clip: Clip, sample: SampleConfig, patch_size: int) -> int:
    """Bytes of the encoded frames of a clip, from what the media index knows.

    Raises:
        ValueError: The clip is too short, or too elongated, to be sampled.
    """
    first = max(clip.start or 0.0, 0.0) * clip.fps
    last = clip.n_frames if clip.end is None else min(clip.end * clip.fps, clip.n_frames)
    is_part = clip.start is not None or clip.end is not None
    # How many frames of a variable rate lie in a part only the file can tell; there, two are enough to go on.
    n_frames = max(round(last - first), 2) if is_part else int(clip.n_frames)
    try:
        count = _count_frames(n_frames, clip.fps, sample)
    except ValueError:
        if not is_part:
            raise
        count = 2
    height, width = _size(count, int(clip.height), int(clip.width), sample, patch_size)
    return round(count * height * width * _BYTES_PER_PIXEL[sample.frame_encoding])


def read_clip(clip: Clip, *, sample: SampleConfig, patch_size: int, backend: str) -> StoredClip:
    """Sample one clip.

    Args:
        clip: The clip.
        sample: Which frames, at which size and encoding.
        patch_size: Side of a vision patch in pixels.
        backend: Decoder, as chosen by `choose_backend`.

    Returns:
        The frames with their seconds, ready for the store.

    Raises:
        ClipError: The file is another one than was validated, or too short or elongated.
        UserError: The clip cannot be decoded.
    """
    try:
        with open_media(clip.path, content_hash=clip.content_hash) as file:
            return _read_open(clip, file, sample, patch_size, backend)
    except ChangedMediaError as error:
        raise ClipError("clip_changed", str(error)) from error


def _read_open(clip: Clip, file: OpenMedia, sample: SampleConfig, patch_size: int, backend: str) -> StoredClip:
    table = read_frame_table(file)
    size: list[tuple[int, int]] = []
    try:
        indices = _choose_frames(table.seconds, table.fps, clip.start, clip.end, sample)

        def fit(height: int, width: int) -> tuple[int, int]:
            size[:] = [_size(len(indices), height, width, sample, patch_size)]
            return size[0]

        # Without a store, one frame tells the size.
        decoded = indices if sample.materialize else indices[:1]
        frames = [
            encode_frame(frame, sample.frame_encoding, sample.jpeg_quality) if sample.materialize else b""
            for frame in resized_frames(backend, file, table, decoded, fit)
        ]
    except ValueError as error:
        raise ClipError("clip_unfit", str(error)) from error
    [(height, width)] = size
    return StoredClip(
        path=clip.path,
        start=clip.start,
        end=clip.end,
        height=height,
        width=width,
        source_fps=table.fps,
        encoding=sample.frame_encoding,
        frame_indices=indices,
        seconds=table.seconds[indices].tolist(),
        frames=frames if sample.materialize else None,
        backend=backend,
        content_hash=clip.content_hash,
    )


def stored_again(clip: Clip, row: dict[str, Any], frames: Any) -> StoredClip:
    """A clip out of the cache, under the name that it has here."""
    facts = {name: row[name] for name in ("height", "width", "source_fps", "encoding", "frame_indices", "seconds")}
    names = {"path": clip.path, "start": clip.start, "end": clip.end, "backend": row["backend"]}
    return StoredClip(**facts, **names, content_hash=clip.content_hash, frames=frames)


def _choose_frames(
    seconds: np.ndarray, fps: float, start: float | None, end: float | None, sample: SampleConfig
) -> list[int]:
    first, last = frame_range(seconds, fps, start, end)
    count = _count_frames(last - first + 1, rate_within(seconds, fps, first, last), sample)
    return spread_frames(seconds, fps, first, last, count)


def _count_frames(n_frames: int, source_fps: float, sample: SampleConfig) -> int:
    return smart_nframes(
        n_frames,
        source_fps,
        strategy=sample.video_sampling_strategy,
        fps=sample.fps,
        frame_num=sample.frame_num,
        min_frames=sample.video_min_frames,
        max_frames=sample.video_max_frames,
    )


def _size(n_frames: int, height: int, width: int, sample: SampleConfig, patch_size: int) -> tuple[int, int]:
    return video_size(
        n_frames,
        height,
        width,
        patch_size=patch_size,
        min_pixels=sample.video_min_pixels,
        max_pixels=sample.video_max_pixels,
        total_pixels=sample.video_total_pixels,
    )

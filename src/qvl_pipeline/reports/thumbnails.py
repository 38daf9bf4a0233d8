"""Pictures of a sample's media, as data URIs a page can hold."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.reports.pictures import FRAME_SIDE, image_uri, picture_uri
from qvl_pipeline.reports.thumbnail import Thumbnail

CLIP_FRAMES = 4
# Of a sample with many pages or clips, the first ones stand for all: a page of such samples is to be looked at.
MOST_MEDIA = 6


class MediaThumbnails:
    """Makes the pictures of a sample from its media: an image, or a few frames of a clip with their seconds."""

    def __init__(self, samples: TokenizedSamples, video_frames: Path) -> None:
        """Set up.

        Args:
            samples: The tokenized samples.
            video_frames: Folder of the frame store.
        """
        self._samples = samples
        self._rows = {sample: row for row, sample in enumerate(samples.columns(["sample_id"])["sample_id"].to_pylist())}
        self._store = FrameStore(video_frames)

    def __call__(self, sample_id: str) -> list[list[Thumbnail]]:
        """Return one list of thumbnails for every image, clip or sound of the sample, in reading order.

        Of more than `MOST_MEDIA`, a line says how many more there are.
        """
        media = self._samples.row(self._rows[sample_id])["media"]
        shown = {"video": self._clip, "image": lambda key: [_image(key)], "audio": lambda key: [_sound(key)]}
        strips = [shown[item["type"]](item["key"]) for item in media[:MOST_MEDIA]]
        more = len(media) - len(strips)
        return [*strips, [Thumbnail(None, f"and {more} more")]] if more else strips

    def pictures(self, medium: Mapping[str, Any], step: int | None) -> list[Thumbnail]:
        """Return the pictures of a run of placeholders.

        Args:
            medium: The image, clip or sound: an entry of the column `media`.
            step: Which temporal patch of a clip it stands for; `None` for all of the medium.

        Returns:
            That of the image, the first frame of the temporal patch, or some frames of the clip; none of a sound.
        """
        if medium["type"] == "image":
            return [_image(medium["key"])]
        if medium["type"] == "audio":
            return []
        if step is None:
            return self._clip(medium["key"])
        seconds = self._store.info(medium["key"])["seconds"]
        number = step * ceil(len(seconds) / medium["grid_t"])
        (frame,) = self._store.frames(medium["key"], slice(number, number + 1))
        return [_frame(frame, seconds[number])]

    def _clip(self, key: str) -> list[Thumbnail]:
        frames, seconds = self._store.frames(key), self._store.info(key)["seconds"]
        shown = np.unique(np.linspace(0, len(frames) - 1, CLIP_FRAMES).round().astype(int))
        return [_frame(frames[number], seconds[number]) for number in shown]


def _frame(frame: np.ndarray, second: float) -> Thumbnail:
    """A frame of a clip, uint8 `[3, H, W]`."""
    return Thumbnail(picture_uri(Image.fromarray(frame.transpose(1, 2, 0)), FRAME_SIDE), f"{second:.2f} s")


def _sound(key: str) -> Thumbnail:
    return Thumbnail(None, f"{Path(key).name} (a sound)")


def _image(key: str) -> Thumbnail:
    """An image, or its name when the file is no longer where it was: a report must not fail for a missing picture."""
    if not Path(key).is_file():
        return Thumbnail(None, f"{Path(key).name} (file is gone)")
    return Thumbnail(image_uri(key), "")

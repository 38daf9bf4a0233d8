"""Media as servers are sent them: data URLs, paths, and the frames of training."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvl_pipeline.config import ServerConfig
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.media.opening import open_media, open_picture
from qvl_pipeline.media.pixels import open_image

# Formats that every server reads.
_COMMON = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # EXIF
# Times are told as frame numbers at this rate, which is finer than any that is written.
TICKS = 1_000_000

Part = dict[str, Any]


class NotAskableError(Exception):
    """A sample cannot be sent to this server; the message says why, and what could."""


class MediaParts:
    """Makes the parts of a message that stand for media."""

    def __init__(self, server: ServerConfig, video_frames: Path, temporal_patch_size: int) -> None:
        """Set up for one server.

        Args:
            server: The server.
            video_frames: Folder of the frame store.
            temporal_patch_size: Frames in a patch.
        """
        self._server = server
        self._store = FrameStore(video_frames)
        self._temporal_patch_size = temporal_patch_size

    def parts(self, medium: Mapping[str, Any], planned: Mapping[str, Any]) -> list[Part]:
        """Return the parts of one medium.

        Args:
            medium: Entry of the column `media` of `sampled_samples`: `type`, `path`, `start`, `end`.
            planned: The entry of `tokenized_samples` that belongs to it: `key`, `content_hash`, `spectra`.

        Raises:
            NotAskableError: The server cannot be sent it.
            UserError: The file is not the one that was validated.
            OSError: It cannot be read.
        """
        if medium["type"] == "audio" or planned["spectra"]:
            raise NotAskableError("it has sound, which is not sent: let transformers answer (evaluate.backend)")
        path, digest = Path(medium["path"]), planned["content_hash"]
        if medium["type"] == "image":
            return [_part("image", self._image(path, digest))]
        if self._server.clips == "images":
            return self._pictures(planned["key"])
        if self._server.clips == "frames":
            frames = self._store.frames(planned["key"])
            return [_part("video", "data:video/jpeg;base64," + ",".join(map(_png, frames)))]
        if medium["start"] is not None or medium["end"] is not None:
            raise NotAskableError(
                "its clip is a part of a file, which no request can say: set clips to frames or images"
            )
        by_path = self._server.media == "file" or self._server.engine == "transformers"
        kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return [_part("video", self._file(path, digest) if by_path else _data(kind, _content(path, digest)))]

    def times(self, planned: Sequence[Mapping[str, Any]]) -> Part | None:
        """Return what vLLM is told of the frames of a sample's clips; nothing where it has none.

        Frame numbers are times in ticks, which tell any rate of frames. The number of frames of the whole clip is such
        that the interval of its patches comes out as the one that the model was told in training.

        Raises:
            NotAskableError: The clips differ in it: a request has one set of times for all of its clips.
        """
        told = [self._told(item) for item in planned if item["type"] == "video"]
        if any(each != told[0] for each in told):
            raise NotAskableError(
                "it has several clips with other times, of which a request has one set: set clips to file or images"
            )
        return told[0] if told else None

    def _told(self, planned: Mapping[str, Any]) -> Part:
        numbers = [round(second * TICKS) for second in self._store.info(planned["key"])["seconds"]]
        patch = planned["seconds_per_grid"] / self._temporal_patch_size
        total = max(round(len(numbers) * patch * TICKS), len(numbers))
        return {
            "num_frames": -1,
            "fps": TICKS,
            "frames_indices": numbers,
            "total_num_frames": total,
            "duration": total / TICKS,
            "do_sample_frames": False,
        }

    def _pictures(self, clip: str) -> list[Part]:
        parts = []
        for second, frame in zip(self._store.info(clip)["seconds"], self._store.frames(clip), strict=True):
            parts += [
                {"type": "text", "text": f"<{second:.1f} seconds>"},
                _part("image", f"data:image/png;base64,{_png(frame)}"),
            ]
        return parts

    def _image(self, path: Path, digest: str | None) -> str:
        with open_media(path, content_hash=digest) as file, open_picture(file) as image:
            kind, upright = image.format, image.getexif().get(_ORIENTATION, 1) == 1
            common = kind in _COMMON and upright and not image.has_transparency_data
        if not common:
            return f"data:image/png;base64,{_png(open_image(path, digest))}"
        if self._server.media == "file":
            return self._file(path, digest)
        return _data(f"image/{kind.lower()}", _content(path, digest))

    def _file(self, path: Path, digest: str | None) -> str:
        with open_media(path, content_hash=digest):
            whole = path.resolve()
        return str(whole) if self._server.engine == "transformers" else whole.as_uri()


def _part(kind: str, url: str) -> Part:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _content(path: Path, digest: str | None) -> bytes:
    with open_media(path, content_hash=digest) as file, Path(file).open("rb") as content:
        return content.read()


def _png(picture: np.ndarray) -> str:
    """Return a picture, uint8 `[3, H, W]`, as PNG in base64."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()

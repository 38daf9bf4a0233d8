from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.reports.pictures import SIDE, picture_uri
from qvl_pipeline.reports.thumbnail import Thumbnail
from qvl_pipeline.reports.thumbnails import MOST_MEDIA, MediaThumbnails
from tests.evaluation.world import write_tokenized


def opened(thumbnail: Thumbnail) -> Image.Image:
    header, _, data = thumbnail.uri.partition(",")
    assert header in ("data:image/png;base64", "data:image/webp;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def sample(sample_id: str, *media: tuple[str, str]) -> dict[str, Any]:
    items = [{"type": kind, "key": key, "seconds_per_grid": 0.0} for kind, key in media]
    return {"sample_id": sample_id, "media": items, "input_ids": [1], "label_spans": []}


@pytest.fixture
def thumbnails(tmp_path: Path) -> MediaThumbnails:
    Image.new("RGB", (400, 200), (200, 30, 30)).save(tmp_path / "red.png")
    frames = np.zeros((9, 3, 8, 8), dtype=np.uint8) + np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1) * 20
    clip = {"path": "clip.mp4", "start": None, "end": None, "height": 8, "width": 8, "source_fps": 4.0}
    with FrameStoreWriter(tmp_path / "frames") as store:
        for name, count in (("clip.mp4", 9), ("short.mp4", 2)):
            store.add(
                StoredClip(
                    **{**clip, "path": name},
                    encoding="raw",
                    frame_indices=list(range(count)),
                    seconds=[number / 4 for number in range(count)],
                    frames=[frame.tobytes() for frame in frames[:count]],
                )
            )
    rows = [
        sample("text"),
        sample("both", ("image", str(tmp_path / "red.png")), ("video", "clip.mp4")),
        sample("short", ("video", "short.mp4")),
        sample("many", *[("image", str(tmp_path / "red.png"))] * 50),
        sample("gone", ("image", str(tmp_path / "gone.png"))),
    ]
    write_tokenized(tmp_path / "tokenized.arrow", rows)
    return MediaThumbnails(TokenizedSamples(tmp_path / "tokenized.arrow"), tmp_path / "frames")


def test_an_image_keeps_its_shape_and_colour_and_is_large_enough_to_be_read(thumbnails: MediaThumbnails) -> None:
    (image,), _ = thumbnails("both")
    picture = opened(image)
    assert picture.size == (400, 200)
    assert picture.getpixel((5, 5)) == pytest.approx((200, 30, 30), abs=3)
    large = Thumbnail(picture_uri(Image.new("RGB", (4000, 1000))), "")
    assert opened(large).size == (SIDE, SIDE // 4)
    assert large.uri == picture_uri(Image.new("RGB", (4000, 1000)))


def test_a_temporal_patch_has_the_picture_of_its_first_frame(thumbnails: MediaThumbnails) -> None:
    clip = {"type": "video", "key": "clip.mp4", "grid_t": 5}  # of nine frames, the last of which is alone
    shown = [thumbnails.pictures(clip, step) for step in (0, 2, 4)]
    assert [(frame.caption, opened(frame).getpixel((0, 0))[0]) for (frame,) in shown] == [
        ("0.00 s", 0),
        ("1.00 s", 80),
        ("2.00 s", 160),
    ]
    assert thumbnails.pictures(clip, None) == thumbnails("both")[1]
    assert thumbnails.pictures({"type": "audio", "key": "a.wav"}, None) == []


def test_a_clip_shows_frames_from_start_to_end_with_their_seconds(thumbnails: MediaThumbnails) -> None:
    _, clip = thumbnails("both")
    assert [frame.caption for frame in clip] == ["0.00 s", "0.75 s", "1.25 s", "2.00 s"]
    assert [opened(frame).getpixel((0, 0))[0] for frame in clip] == [0, 60, 100, 160]
    assert len(thumbnails("short")[0]) == 2


def test_of_many_pictures_the_first_are_shown(thumbnails: MediaThumbnails) -> None:
    *shown, last = thumbnails("many")
    assert len(shown) == MOST_MEDIA
    assert last == [Thumbnail(None, f"and {50 - MOST_MEDIA} more")]


def test_text_alone_has_no_pictures(thumbnails: MediaThumbnails) -> None:
    assert thumbnails("text") == []


def test_a_file_that_is_gone_is_named(thumbnails: MediaThumbnails) -> None:
    assert thumbnails("gone") == [[Thumbnail(None, "gone.png (file is gone)")]]

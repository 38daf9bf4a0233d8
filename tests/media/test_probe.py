"""Probing: facts about whole files, and a reason for each broken one."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from qvl_pipeline.media.frames.decoding import decode_frames, read_frame_table
from qvl_pipeline.media.frames.sampling import frame_range
from qvl_pipeline.media.pixels import open_image
from qvl_pipeline.media.probe import Probe, probe_media
from tests.media.clips import number_in, write_clip
from tests.media.files import cut, write_image, write_png_bomb, write_video

MAX_PIXELS = 100_000


def _probe(path: Path, kind: str) -> Probe:
    return probe_media(str(path), kind, MAX_PIXELS)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_facts_of_an_image(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", width=8, height=6)
    size, content_hash = path.stat().st_size, _sha256(path)
    assert _probe(path, "image") == Probe(
        content_hash=content_hash, width=8, height=6, n_frames=1, codec="png", size_bytes=size, mode="RGB"
    )


def _write_pictures(path: Path, count: int) -> Path:
    pictures = [Image.open(write_image(path.with_suffix(f".{n}.png"), 32, 32, seed=n)) for n in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    return path


@pytest.mark.parametrize("ending", ["gif", "webp", "tiff", "png"])
def test_the_pictures_of_an_image_file_are_counted(tmp_path: Path, ending: str) -> None:
    assert _probe(_write_pictures(tmp_path / f"a.{ending}", 3), "image").n_frames == 3
    assert _probe(_write_pictures(tmp_path / f"b.{ending}", 1), "image").n_frames == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_further_picture_does_not_break_the_first(tmp_path: Path) -> None:
    path = cut(_write_pictures(tmp_path / "a.tiff", 3), 0.5)
    probe = _probe(path, "image")
    assert (probe.failure, probe.n_frames, probe.width) == (None, None, 32)


def test_facts_of_a_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=9, width=32, height=16, fps=4)
    assert _probe(path, "video") == Probe(
        content_hash=_sha256(path),
        width=32,
        height=16,
        n_frames=9,
        fps=4.0,
        duration_s=2.25,
        codec="h264",
        size_bytes=path.stat().st_size,
        declared_duration_s=2.25,
        longest_gap=1.0,
    )


def test_an_uneven_clip_says_how_uneven(tmp_path: Path) -> None:
    probe = _probe(write_clip(tmp_path / "a.mp4", [0, 0.1, 0.2, 0.5, 0.6]), "video")
    assert probe.longest_gap == pytest.approx(3.0)


def test_a_clip_that_is_cut_off_still_claims_its_whole_duration(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", [n / 10 for n in range(100)], gop=5)
    probe = _probe(cut(path, 0.5), "video")
    assert probe.declared_duration_s == pytest.approx(10.0, abs=0.2)
    assert probe.duration_s < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = write_image(tmp_path / "a.jpg", width=8, height=6, exif=exif)
    probe = _probe(path, "image")
    with Image.open(path) as image:
        assert (probe.width, probe.height) == ImageOps.exif_transpose(image).size


def test_an_empty_file_is_that(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert _probe(tmp_path / "a.png", "image") == Probe(size_bytes=0)


def test_missing(tmp_path: Path) -> None:
    assert _probe(tmp_path / "a.png", "image") == Probe(missing="does not exist")
    assert _probe(tmp_path, "video") == Probe(missing="is not a file")


def test_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = write_image(tmp_path / "a.png")
    monkeypatch.setattr("os.open", refuse)
    assert _probe(path, "image") == Probe(failure="Permission denied")


def _garbage(path: Path) -> Path:
    path.write_bytes(b"not a media file\n" * 100)
    return path


@pytest.mark.parametrize(
    ("kind", "make", "reason"),
    [
        ("image", lambda folder: _garbage(folder / "a.png"), "cannot identify image file"),
        ("video", lambda folder: _garbage(folder / "a.mp4"), "Invalid data found"),
        ("image", lambda folder: cut(write_image(folder / "a.png", 64, 64), 0.5), "truncated"),
        ("image", lambda folder: cut(write_image(folder / "a.jpg", 64, 64), 0.5), "truncated"),
        ("video", lambda folder: cut(write_video(folder / "a.mp4"), 0.5), "Invalid data found"),
        # Header first: the file opens, and only decoding shows that the end is not there.
        ("video", lambda folder: cut(write_video(folder / "a.mp4", movflags="faststart"), 0.9), "Invalid data found"),
        ("image", lambda folder: write_video(folder / "a.png.mp4"), "cannot identify image file"),
    ],
)
def test_undecodable(tmp_path: Path, kind: str, make, reason: str) -> None:
    probe = _probe(make(tmp_path), kind)
    assert reason in probe.failure
    assert probe.missing is None


def test_broken_file_keeps_its_hash(tmp_path: Path) -> None:
    path = _garbage(tmp_path / "a.mp4")
    assert _probe(path, "video").content_hash == _sha256(path)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(
        b"RIFF\x44\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x80\x3e\x00\x00\x02\x00\x10\x00"
        b"data\x20\x00\x00\x00" + bytes(32)
    )
    assert _probe(path, "video").failure == "holds no video stream"


def test_a_bomb_is_not_decoded(tmp_path: Path) -> None:
    path = write_png_bomb(tmp_path / "a.png", side=100_000)
    assert _probe(path, "image") == Probe(
        content_hash=_sha256(path),
        width=100_000,
        height=100_000,
        n_frames=1,
        codec="png",
        mode="RGB",
        size_bytes=path.stat().st_size,
    )


def test_frames_too_large_are_not_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=2, width=400, height=300)
    probe = _probe(path, "video")
    assert (probe.width, probe.height, probe.n_frames, probe.failure) == (400, 300, None, None)


def test_clip_without_timestamps_has_no_frame_rate(tmp_path: Path) -> None:
    probe = _probe(write_video(tmp_path / "a.h264"), "video")
    assert (probe.fps, probe.n_frames, probe.failure) == (None, None, None)


def test_matroska_that_starts_late_has_its_own_second_zero(tmp_path: Path) -> None:
    """It says when it ends, not how long it is; its parts are counted from its first frame, as players do."""
    seconds = [5 + number / 10 for number in range(60)]
    path = write_clip(tmp_path / "late.mkv", seconds, time_base=Fraction(1, 1000), rate=Fraction(10))
    probe = _probe(path, "video")
    assert (probe.n_frames, probe.duration_s) == (60, pytest.approx(6.0))
    assert probe.declared_duration_s == pytest.approx(5.9, abs=0.11)
    table = read_frame_table(str(path))
    np.testing.assert_allclose(table.seconds, np.arange(60) / 10, atol=1e-6)
    assert frame_range(table.seconds, table.fps, 1.0, 2.0) == (10, 20)
    assert [number_in(frame) for frame in decode_frames(str(path), table, [10, 20, 59])] == [10, 20, 59]


@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe+empty_moov"])
def test_a_clip_of_which_only_the_header_is_left_is_cut_off(tmp_path: Path, flags: str) -> None:
    path = write_video(tmp_path / "a.mp4", frames=40, movflags=flags)
    whole = path.read_bytes()
    reasons = set()
    for length in range(32, len(whole) // 8, 64):
        path.write_bytes(whole[:length])
        probe = _probe(path, "video")
        assert probe.failure or probe.n_frames, length
        reasons.add(probe.failure)
    assert "holds no frames: the file is cut off or damaged" in reasons
    assert "its video stream is of no known codec: the file is cut off or damaged" in reasons
    assert not [reason for reason in reasons if reason and "attribute" in reason]


@pytest.mark.parametrize(("brightest", "mode"), [(255, "L"), (256, "I;16")])
def test_a_grey_image_of_16_bits_is_deep_where_8_do_not_hold_it(tmp_path: Path, brightest: int, mode: str) -> None:
    grey = np.linspace(0, brightest, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert _probe(tmp_path / "a.png", "image").mode == mode
    seen = open_image(tmp_path / "a.png")
    assert (seen[0] == grey).all() == (mode == "L")

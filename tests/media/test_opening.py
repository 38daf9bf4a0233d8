"""Hostile media: what is not a medium opens nothing else and starts nothing, and what was swapped is noticed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.clips import frames_from_source
from qvl_pipeline.media.frames.decoding import read_frame_table
from qvl_pipeline.media.opening import ChangedMediaError, NoFileError, OutsideFolderError, hash_media, open_media
from qvl_pipeline.media.pixels import open_image
from qvl_pipeline.media.probe import probe_media
from tests.media.files import write_image, write_video

MAX_PIXELS = 100_000
NOT_READ = "its format is not one of a video, or not one that is read"

PLAYLISTS: dict[str, Callable[[Path], str]] = {
    "list.m3u8": lambda outside: f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{outside}.ts\n#EXT-X-ENDLIST\n",
    "concat.mp4": lambda outside: f"ffconcat version 1.0\nfile '{outside}.mp4'\n",
    "dash.mpd": lambda outside: (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        f'<Period><AdaptationSet mimeType="video/mp4"><Representation id="1"><BaseURL>{outside}.mp4</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    ),
    "session.sdp": lambda outside: "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "list.mp4": lambda outside: f"{outside}.mp4\n",
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A clip, as `.ts` and `.mp4`, and an image beside the folder of media."""
    (tmp_path / "media").mkdir()
    for ending in ("ts", "mp4"):
        write_video(tmp_path / f"outside.{ending}")
    write_image(tmp_path / "outside.png")
    return tmp_path / "outside"


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_opens_no_other_file(outside: Path, name: str) -> None:
    path = outside.parent / "media" / name
    path.write_text(PLAYLISTS[name](outside))
    probe = probe_media(str(path), "video", MAX_PIXELS)
    assert (probe.width, probe.n_frames) == (None, None)
    assert probe.failure
    with pytest.raises(UserError, match=f"'{path}' cannot be decoded"):
        read_frame_table(str(path))


def test_a_name_is_no_pattern_and_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_image(tmp_path / f"imgseq0{number}.png")
    write_video(tmp_path / "a.mp4")
    for name in ("imgseq%02d.png", "concat:a.mp4|a.mp4", "subfile,,start,0,end,0,,:a.mp4", "async:a.mp4"):
        with pytest.raises(UserError, match="cannot be decoded"):
            read_frame_table(name)
        assert probe_media(name, "video", MAX_PIXELS).missing == "does not exist"
        # A file of that very name is the medium.
        (tmp_path / name).write_bytes((tmp_path / "a.mp4").read_bytes())
        assert probe_media(name, "video", MAX_PIXELS).n_frames == 8


def test_postscript_named_like_a_picture_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, **_: started.append(command))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "/bin/true")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    path = (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    assert probe_media(str(path), "image", MAX_PIXELS).failure.startswith("cannot identify image file")
    with pytest.raises(OSError, match="cannot identify image file"):
        open_image(path)
    assert started == []


def test_what_is_no_file_is_named_as_such_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "p01.png").mkdir()
    os.mkfifo(tmp_path / "p02.png")
    (tmp_path / "p03.png").symlink_to("/dev/zero")
    for number in (1, 2, 3):
        path = tmp_path / f"p0{number}.png"
        assert probe_media(str(path), "image", MAX_PIXELS).missing == "is not a file"
        with pytest.raises(NoFileError, match="is not a file"):
            open_image(path)


def test_a_link_that_leads_outside_is_not_read(outside: Path) -> None:
    folder = outside.parent / "media"
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "inside.png").symlink_to("a.png")
    write_image(folder / "a.png")
    folders = [str(folder)]
    found = probe_media(str(folder / "link.png"), "image", MAX_PIXELS, folders)
    assert found.missing == f"leads to '{outside}.png', outside of data_folder"
    assert (found.content_hash, found.width) == (None, None)
    assert probe_media(str(folder / "inside.png"), "image", MAX_PIXELS, folders).codec == "png"
    assert probe_media(str(folder / "none.png"), "image", MAX_PIXELS, folders).missing == "does not exist"


def test_a_link_that_is_swapped_while_it_is_opened_is_noticed(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at where a path leads and its opening, a folder on its way becomes a link."""
    folder = outside.parent / "media"
    path = write_image(folder / "sub" / "outside.png")
    opened = os.open

    def swap(name: str, flags: int) -> int:
        (folder / "sub").rename(folder / "was")
        (folder / "sub").symlink_to("..")
        return opened(name, flags)

    monkeypatch.setattr(os, "open", swap)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with (
        pytest.raises(OutsideFolderError, match=r"leads to .*outside\.png', outside of data_folder"),
        open_media(path, folders=[str(folder)]),
    ):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_is_read_is_the_file_that_was_opened(outside: Path) -> None:
    path = write_video(outside.parent / "media" / "a.mp4", frames=5)
    with open_media(path) as file:
        path.unlink()
        path.symlink_to("../outside.mp4")
        assert len(read_frame_table(file).seconds) == 5
        assert str(file) == str(path)
    assert len(read_frame_table(str(path)).seconds) == 8


def test_an_image_that_was_swapped_after_validation_is_named(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    content_hash = probe_media(str(path), "image", MAX_PIXELS).content_hash
    assert open_image(path, content_hash).shape == (3, 6, 8)
    status = path.stat()
    write_image(tmp_path / "b.png", seed=1).rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ChangedMediaError, match=r"'.*a\.png' has changed since 'validate' ran: put back"):
        open_image(path, content_hash)


def test_a_clip_that_was_swapped_is_named_where_frames_are_not_stored(tmp_path: Path) -> None:
    """Its frames have the same times and sizes: only the content tells."""
    path = write_video(tmp_path / "a.mp4")
    table = read_frame_table(str(path))
    with open_media(path) as file:
        info = {
            **{"path": str(path), "content_hash": hash_media(file), "backend": "pyav", "height": 16, "width": 32},
            **{"frame_indices": [0, 3], "seconds": table.seconds[[0, 3]].tolist()},
        }
    assert frames_from_source(info).shape == (2, 3, 16, 32)
    write_video(path, seed=1)
    with pytest.raises(ChangedMediaError, match=r"'.*a\.mp4' has changed since 'validate' ran"):
        frames_from_source(info)

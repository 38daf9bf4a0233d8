"""Sound files that are bad in any way: each is named by its rule, and none takes the probing process along."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.validation.rules import broken_by_media, first_error
from qvl_pipeline.media.probe import probe_media
from qvl_pipeline.media.probe_worker import ProbeWorker
from tests.media.files import cut, write_image, write_video
from tests.media.sounds import tone, write_sound, write_wav

CONFIG = ValidateConfig()
PCM, FLOAT = 1, 3


def wav(path: Path, data: bytes, *, rate: int = 16_000, channels: int = 1, bits: int = 16, form: int = PCM) -> None:
    """Write a WAV whose header says anything."""
    block = channels * bits // 8
    header = struct.pack("<HHIIHH", form, channels & 0xFFFF, rate, (rate * block) & 0xFFFFFFFF, block & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def pcm(seconds: float, rate: int = 16_000) -> bytes:
    return (tone(seconds, rate) * 32767).astype("<i2").tobytes()


def _floats(value: float) -> bytes:
    samples = tone(1.0)
    samples[100] = value
    return samples.astype("<f4").tobytes()


def _cut_sound(path: Path, codec: str) -> None:
    cut(write_sound(path, tone(8.0), codec=codec), 0.5)


def _outside(path: Path) -> None:
    path.symlink_to(write_wav(path.parent.parent / "outside.wav", tone(1.0)))


# What is written in the place of a sound, and the rule that must name it.
BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing.wav": ("missing_media", lambda path: None),
    "folder.wav": ("missing_media", Path.mkdir),
    "pipe.wav": ("missing_media", os.mkfifo),
    "outside.wav": ("missing_media", _outside),
    "to_itself.wav": ("missing_media", lambda path: path.symlink_to(path)),
    "empty.wav": ("empty_media", Path.touch),
    "text.wav": ("undecodable_media", lambda path: path.write_text("no sound\n" * 100)),
    "noise.mp3": ("undecodable_media", lambda path: path.write_bytes(b"\x00\x17\xa5" * 5000)),
    "zeros.flac": ("undecodable_media", lambda path: path.write_bytes(bytes(10_000))),
    "picture.wav": ("undecodable_media", lambda path: write_image(path.with_suffix(".png")).rename(path)),
    "silent_clip.mp4": ("undecodable_media", write_video),
    "playlist.mp3": ("undecodable_media", lambda path: path.write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n")),
    "concat.wav": ("undecodable_media", lambda path: path.write_text("ffconcat version 1.0\nfile missing.wav\n")),
    "session.sdp": ("undecodable_media", lambda path: path.write_text("v=0\nm=audio 5004 RTP/AVP 0\n")),
    "cut_header.wav": ("undecodable_media", lambda path: path.write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")),
    "no_samples.wav": ("undecodable_media", lambda path: wav(path, b"")),
    "no_rate.wav": ("undecodable_media", lambda path: wav(path, pcm(1.0), rate=0)),
    "no_channels.wav": ("undecodable_media", lambda path: wav(path, pcm(1.0), channels=0)),
    "no_bits.wav": ("undecodable_media", lambda path: wav(path, pcm(1.0), bits=0)),
    "unknown_codec.wav": ("undecodable_media", lambda path: wav(path, pcm(1.0), form=0x9999)),
    "not_a_number.wav": ("undecodable_media", lambda path: wav(path, _floats(np.nan), bits=32, form=FLOAT)),
    "infinite.wav": ("undecodable_media", lambda path: wav(path, _floats(np.inf), bits=32, form=FLOAT)),
    "cut.m4a": ("undecodable_media", lambda path: _cut_sound(path, "aac")),
    "cut.flac": ("undecodable_media", lambda path: _cut_sound(path, "flac")),
    "one_a_second.wav": ("absurd_sample_rate", lambda path: wav(path, pcm(1.0), rate=1)),
    "hundred_a_second.wav": ("absurd_sample_rate", lambda path: wav(path, pcm(1.0), rate=100)),
    "million_a_second.wav": ("absurd_sample_rate", lambda path: wav(path, pcm(1.0), rate=10_000_000)),
    "many_channels.wav": ("too_many_channels", lambda path: wav(path, pcm(2.0), channels=32)),
    "silence.wav": ("silent_sound", lambda path: wav(path, bytes(32_000))),
    "almost_silence.wav": ("silent_sound", lambda path: wav(path, b"\x01\x00\xff\xff" * 8000)),
    "opposite_phases.wav": ("silent_sound", lambda path: write_wav(path, np.stack([tone(1.0), -tone(1.0)]))),
    "blink.wav": ("sound_too_short", lambda path: wav(path, pcm(0.02))),
    "hour.wav": ("sound_too_long", lambda path: wav(path, b"\x40\xc0" * 1_250_000, rate=8000, bits=8)),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str] | None]:
    """The rule that each file breaks, with the detail."""
    folder = (tmp_path_factory.mktemp("bad") / "media").resolve()
    folder.mkdir()
    rules = {}
    with ProbeWorker(timeout_s=600, max_pixels=10**6, folders=[str(folder)]) as worker:
        for name, (_, write) in BAD.items():
            write(folder / name)
            probe = worker.probe(str(folder / name), "audio")
            use = Media("audio", str(folder / name))
            rules[name] = first_error(broken_by_media([use], {use[:2]: probe}, CONFIG), CONFIG)
        status = Path(f"/proc/{worker._child.pid}/status").read_text()
        peak_mib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) >> 10
    assert peak_mib < 600
    return rules


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sound_is_named(name: str, found: dict[str, tuple[str, str] | None]) -> None:
    rule, detail = found[name] or ("none", "")
    assert rule == BAD[name][0], detail
    assert name in detail
    assert "crashed" not in detail
    assert "took longer" not in detail


def test_they_are_many_and_one_process_probed_them_all(found: dict[str, tuple[str, str] | None]) -> None:
    assert len(found) >= 25
    assert not any("exit status" in detail for _, detail in found.values())


@pytest.mark.parametrize(
    ("start", "end", "rule"),
    [(5.0, None, "sound_too_short"), (0.5, 0.55, "sound_too_short"), (0.0, None, None), (0.5, 9.0, None)],
)
def test_the_part_that_is_used_counts(start: float, end: float | None, rule: str | None, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1.0))
    use = Media("audio", str(path), start, end)
    broken = first_error(broken_by_media([use], {use[:2]: probe_media(str(path), "audio", 10)}, CONFIG), CONFIG)
    assert (broken and broken[0]) == rule

from __future__ import annotations

import contextlib
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.backends import choose_backend, decode_with
from qvl_pipeline.media.frames.decoding import decode_frames, read_frame_table
from tests.media.clips import number_in, rotate_mp4, write_clip
from tests.media.frames.test_decoding import CLIPS, CONSTANT, N_FRAMES, VARIABLE, cut


def loads(backend: str) -> bool:
    try:
        return choose_backend(backend) == backend
    except UserError:
        return False


# torchcodec is an extra that needs FFmpeg's libraries; decord comes with the development tools.
OTHERS = ["decord", pytest.param("torchcodec", marks=pytest.mark.skipif(not loads("torchcodec"), reason="extra"))]
COLORSPACES = {"untagged": None, "bt709": 1}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def assert_agreement(path: Path, backend: str, indices: list[int]) -> None:
    table = read_frame_table(str(path))
    ours = list(decode_with("pyav", str(path), table, indices))
    theirs = list(decode_with(backend, str(path), table, indices))
    assert [frame.shape for frame in theirs] == [frame.shape for frame in ours]
    assert min(psnr(one, other) for one, other in zip(ours, theirs, strict=True)) >= 45


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "name", ["constant.mp4", "ntsc.mp4", "b_frames.mp4", "variable.mp4", "variable.mkv", "late.mp4"]
)
def test_backends_give_the_same_frames(tmp_path: Path, backend: str, name: str) -> None:
    path = write_clip(tmp_path / name, **CLIPS[name])
    assert_agreement(path, backend, [0, 3, 20, 21, 21, 44, N_FRAMES - 1])
    table = read_frame_table(str(path))
    assert [number_in(frame) for frame in decode_with(backend, str(path), table, [7, 50])] == [7, 50]


def write_colours(path: Path, height: int, width: int, colorspace: int | None = None) -> Path:
    """Encode ten frames of smooth colours that move."""
    rows, columns = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p" if height % 2 else "yuv420p"
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        for number in range(10):
            waves = [np.sin((rows * a + columns * b) / 25 + number) for a, b in ((1, 2), (2, -1), (0, 1))]
            picture = (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("colorspace", COLORSPACES)
@pytest.mark.parametrize("size", [(90, 160), (97, 131)])
def test_backends_give_the_same_colours(tmp_path: Path, backend: str, colorspace: str, size: tuple[int, int]) -> None:
    path = write_colours(tmp_path / "clip.mp4", *size, COLORSPACES[colorspace])
    assert_agreement(path, backend, [0, 5, 9])


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_backends_turn_a_picture_upright(tmp_path: Path, backend: str, quarter_turns: int) -> None:
    path = write_colours(tmp_path / "clip.mp4", 64, 96)
    rotate_mp4(path, quarter_turns)
    assert_agreement(path, backend, [0, 9])


@pytest.mark.parametrize("backend", OTHERS)
def test_backends_decode_a_clip_of_one_frame(tmp_path: Path, backend: str) -> None:
    assert_agreement(write_clip(tmp_path / "clip.mp4", [0.0], time_base=Fraction(1, 10)), backend, [0, 0])


@pytest.mark.parametrize("backend", OTHERS)
def test_frames_trimmed_by_an_edit_list_are_the_same_or_refused(tmp_path: Path, backend: str) -> None:
    path = write_clip(tmp_path / "clip.mp4", CONSTANT, time_base=Fraction(1, 10), b_frames=2)
    trimmed = cut(path, tmp_path / "trimmed.mp4", earlier=Fraction(3, 2))
    table = read_frame_table(str(trimmed))
    with contextlib.suppress(UserError):
        assert [number_in(frame) for frame in decode_with(backend, str(trimmed), table, [0, 30])] == [15, 45]


@pytest.mark.parametrize("backend", OTHERS)
def test_a_file_that_a_backend_cannot_read_is_named(tmp_path: Path, backend: str) -> None:
    path = write_clip(tmp_path / "clip.mp4", CONSTANT, time_base=Fraction(1, 10))
    table = read_frame_table(str(path))
    path.write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match=rf"clip.mp4' cannot be decoded by {backend}"):
        list(decode_with(backend, str(path), table, [0]))


@pytest.mark.parametrize(("backend", "module"), [("torchcodec", "torchcodec.decoders"), ("decord", "decord")])
def test_a_backend_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch, backend: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"video_backend is {backend}, but it cannot be loaded"):
        choose_backend(backend)
    assert choose_backend("qwen_vl_utils") == choose_backend("pyav") == "pyav"


class FakeTorchcodec:
    """torchcodec's decoder as far as it is used here; its frames come from PyAV, `late` seconds too late."""

    late = 0.0

    def __init__(self, path: str, *, dimension_order: str, seek_mode: str, num_ffmpeg_threads: int) -> None:
        assert (dimension_order, seek_mode, num_ffmpeg_threads) == ("NHWC", "exact", 1)
        self._path, self._table = path, read_frame_table(path)

    def get_frame_at(self, index: int) -> SimpleNamespace:
        [picture] = decode_frames(self._path, self._table, [index])
        second = float(self._table.seconds[index]) + (self.late if index else 0.0)
        return SimpleNamespace(data=torch.from_numpy(picture), pts_seconds=second)


@pytest.fixture
def torchcodec(monkeypatch: pytest.MonkeyPatch) -> type[FakeTorchcodec]:
    decoders = ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = FakeTorchcodec
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    return FakeTorchcodec


def test_torchcodec_decodes_the_frames_asked_for_and_must_agree_on_their_time(
    tmp_path: Path, torchcodec: type[FakeTorchcodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_backend("torchcodec") == "torchcodec"
    path = str(write_clip(tmp_path / "clip.mp4", VARIABLE, time_base=Fraction(1, 1000)))
    table = read_frame_table(path)
    assert [number_in(frame) for frame in decode_with("torchcodec", path, table, [3, 40])] == [3, 40]
    monkeypatch.setattr(torchcodec, "late", 0.02)
    with pytest.raises(UserError, match=r"torchcodec has frame 40 .* set video_backend: pyav"):
        list(decode_with("torchcodec", path, table, [40]))

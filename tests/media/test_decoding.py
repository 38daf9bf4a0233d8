from __future__ import annotations

import sys
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from qvl_pipeline.errors import UserError
from qvl_pipeline.media import decoding
from qvl_pipeline.media.decoding import choose_backend, decode_frames, read_frame_table
from tests.media.clips import number_in, rotate_mp4, write_clip

N_FRAMES = 60
CONSTANT = [number / 10 for number in range(N_FRAMES)]
NTSC = [number * 1001 / 30000 for number in range(N_FRAMES)]
VARIABLE = list(accumulate([0.02, 0.04, 1.0, 0.1, 0.5] * (N_FRAMES // 5), initial=0.0))[:N_FRAMES]
LATE = [second + 0.5 for second in CONSTANT]

CLIPS = {
    "constant.mp4": {"seconds": CONSTANT, "time_base": Fraction(1, 10)},
    "ntsc.mp4": {"seconds": NTSC, "time_base": Fraction(1001, 30000)},
    "b_frames.mp4": {"seconds": CONSTANT, "time_base": Fraction(1, 10), "b_frames": 3},
    "variable.mp4": {"seconds": VARIABLE, "time_base": Fraction(1, 1000), "b_frames": 2},
    "variable.mkv": {"seconds": VARIABLE, "time_base": Fraction(1, 1000), "b_frames": 2},
    "late.mp4": {"seconds": LATE, "time_base": Fraction(1, 10)},
    "broadcast.ts": {"seconds": CONSTANT, "time_base": Fraction(1, 10), "b_frames": 2},
    "open_gop.mp4": {
        "seconds": CONSTANT,
        "time_base": Fraction(1, 10),
        "b_frames": 3,
        "options": {"x264-params": "open-gop=1"},
    },
    # Its stream holds packets that are never shown.
    "hidden.webm": {
        "seconds": CONSTANT,
        "time_base": Fraction(1, 10),
        "codec": "libvpx",
        "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"},
    },
}


@pytest.fixture(scope="module", params=CLIPS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    path = tmp_path_factory.mktemp("clips") / request.param
    write_clip(path, **CLIPS[request.param])
    return str(path), CLIPS[request.param]["seconds"]


def test_seconds_are_those_at_which_the_source_shows_each_frame(clip: tuple[str, list[float]]) -> None:
    path, seconds = clip
    table = read_frame_table(path)
    np.testing.assert_allclose(table.seconds, seconds, atol=1e-9)


@pytest.mark.parametrize("indices", [range(N_FRAMES), [3, 5, 5, 20, 21, 44, 59], [59], [0, 58], [13, 37]])
def test_a_frame_is_the_one_that_its_second_says(clip: tuple[str, list[float]], indices: list[int]) -> None:
    path, _ = clip
    table = read_frame_table(path)
    assert [number_in(frame) for frame in decode_frames(path, table, indices)] == list(indices)


def test_seeking_and_decoding_through_give_the_same_pixels(clip: tuple[str, list[float]]) -> None:
    path, _ = clip
    table = read_frame_table(path)
    through = list(decode_frames(path, table, range(N_FRAMES)))
    wanted = [2, 30, 31, 57]
    for index, frame in zip(wanted, decode_frames(path, table, wanted), strict=True):
        np.testing.assert_array_equal(frame, through[index])


def test_mean_rate_is_the_declared_one_unless_the_frames_contradict_it(tmp_path: Path) -> None:
    ntsc = write_clip(tmp_path / "ntsc.mp4", NTSC, time_base=Fraction(1001, 30000))
    variable = write_clip(tmp_path / "variable.mp4", VARIABLE, time_base=Fraction(1, 1000))
    assert read_frame_table(str(ntsc)).fps == 30000 / 1001
    expected = (N_FRAMES - 1) / (VARIABLE[-1] - VARIABLE[0])
    assert read_frame_table(str(variable)).fps == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_display_rotation_is_applied(tmp_path: Path, quarter_turns: int) -> None:
    path = write_clip(tmp_path / "clip.mp4", CONSTANT, time_base=Fraction(1, 10))
    table = read_frame_table(str(path))
    [stored] = decode_frames(str(path), table, [37])
    rotate_mp4(path, quarter_turns)
    [shown] = decode_frames(str(path), table, [37])
    np.testing.assert_array_equal(shown, np.rot90(stored, k=-quarter_turns))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Presentation times of the frames that the decoder returns, in order."""
    returned: list[int] = []
    pts = decoding._pts

    def record(frame: object) -> int:
        returned.append(pts(frame))
        return returned[-1]

    monkeypatch.setattr(decoding, "_pts", record)
    return returned


def test_a_far_frame_costs_no_more_than_its_group_of_pictures(tmp_path: Path, decoded: list[int]) -> None:
    path = str(write_clip(tmp_path / "clip.mp4", [n / 10 for n in range(240)], time_base=Fraction(1, 10), gop=12))
    table = read_frame_table(path)
    list(decode_frames(path, table, [10, 239]))
    assert len(set(decoded)) <= 11 + 12


def test_frames_are_decoded_as_they_are_asked_for(tmp_path: Path, decoded: list[int]) -> None:
    path = str(write_clip(tmp_path / "clip.mp4", [n / 10 for n in range(240)], time_base=Fraction(1, 10)))
    table = read_frame_table(path)
    frames = decode_frames(path, table, range(240))
    next(frames), next(frames)
    assert len(set(decoded)) == 2


def test_a_demuxer_that_misses_its_keyframe_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_clip(tmp_path / "clip.mp4", CONSTANT, time_base=Fraction(1, 10)))
    table = read_frame_table(path)
    seek = decoding.av.container.InputContainer.seek

    class Misled:
        """A container that seeks half a second too far."""

        def __init__(self, container: object) -> None:
            self._container = container

        def __getattr__(self, name: str) -> object:
            return getattr(self._container, name)

        def seek(self, offset: int, **kwargs: object) -> None:
            seek(self._container, offset + 3 * 5120, backward=False, **kwargs)

        def __enter__(self) -> Misled:
            return self

        def __exit__(self, *_: object) -> None:
            self._container.close()

    opened = decoding.av.open
    monkeypatch.setattr(decoding.av, "open", lambda path: Misled(opened(path)))
    indices = [1, 20, 45, 59]
    assert [number_in(frame) for frame in decode_frames(path, table, indices)] == indices


def test_a_frame_that_cannot_be_decoded_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = str(write_clip(tmp_path / "clip.mp4", CONSTANT, time_base=Fraction(1, 10)))
    shorter = str(write_clip(tmp_path / "shorter.mp4", CONSTANT[:30], time_base=Fraction(1, 10)))
    with pytest.raises(UserError, match=r"shorter.mp4': frame 40 at second 4\.000 cannot be decoded"):
        list(decode_frames(shorter, read_frame_table(path), [40]))


def test_a_file_that_is_no_video_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match=r"video '.*broken.mp4' cannot be read"):
        read_frame_table(str(path))


def test_torchcodec_is_an_error_when_it_does_not_load_and_optional_for_qwen_vl_utils(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UserError, match="video_backend is torchcodec, but it cannot be loaded"):
        choose_backend("torchcodec")
    assert choose_backend("qwen_vl_utils") == "pyav"
    assert choose_backend("pyav") == "pyav"

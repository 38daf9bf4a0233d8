from __future__ import annotations

import tracemalloc
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames import decoding
from qvl_pipeline.media.frames.decoding import decode_frames, read_frame_table
from qvl_pipeline.media.frames.sampling import spread_frames
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
    "vp8.webm": {"seconds": CONSTANT, "time_base": Fraction(1, 10), "codec": "libvpx"},
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


def hide_frame(path: Path, hidden: Path, number: int) -> None:
    """Copy a VP8 clip, one of whose frames is decoded but no longer shown (bit 4 of its first byte, RFC 6386)."""
    with decoding.av.open(str(path)) as source, decoding.av.open(str(hidden), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = (packet for packet in source.demux(video=0) if packet.size)
        for position, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            data[0] &= 0xEF if position == number else 0xFF
            copy = decoding.av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            target.mux(copy)


def test_a_frame_that_is_never_shown_is_not_counted(tmp_path: Path) -> None:
    shown = [number for number in range(N_FRAMES) if number != 7]
    path = write_clip(tmp_path / "clip.webm", CONSTANT, time_base=Fraction(1, 10), codec="libvpx")
    hide_frame(path, tmp_path / "hidden.webm", 7)
    table = read_frame_table(str(tmp_path / "hidden.webm"))
    np.testing.assert_allclose(table.seconds, [CONSTANT[number] for number in shown], atol=1e-9)
    frames = decode_frames(str(tmp_path / "hidden.webm"), table, range(len(shown)))
    assert [number_in(frame) for frame in frames] == shown


def cut(path: Path, target: Path, from_packet: int = 0, earlier: Fraction = Fraction(0)) -> Path:
    """Copy the packets of a clip from one of them on, presented `earlier` by so many seconds, without re-encoding."""
    with decoding.av.open(str(path)) as source, decoding.av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets[from_packet:]:
            shift = round(earlier / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            container.mux(packet)
    return target


def test_frames_that_an_edit_list_trims_are_not_counted(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", CONSTANT, time_base=Fraction(1, 10), b_frames=2)
    trimmed = str(cut(path, tmp_path / "trimmed.mp4", earlier=Fraction(3, 2)))
    table = read_frame_table(trimmed)
    np.testing.assert_allclose(table.seconds, CONSTANT[: N_FRAMES - 15], atol=1e-9)
    frames = decode_frames(trimmed, table, range(N_FRAMES - 15))
    assert [number_in(frame) for frame in frames] == list(range(15, N_FRAMES))


def test_frames_whose_references_were_cut_away_are_not_counted(tmp_path: Path) -> None:
    """A clip cut at a keyframe of an open group: the frames shown before it refer to the group before."""
    options = {"x264-params": "open-gop=1:keyint=12:scenecut=0:b-adapt=0"}
    path = write_clip(tmp_path / "clip.mkv", CONSTANT, time_base=Fraction(1, 10), b_frames=3, options=options)
    with decoding.av.open(str(path)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    headless = str(cut(path, tmp_path / "headless.mkv", from_packet=keys[2]))
    table = read_frame_table(headless)
    numbers = [number_in(frame) for frame in decode_frames(headless, table, range(len(table.seconds)))]
    assert numbers == list(range(24, N_FRAMES))
    # The clock of a Matroska file starts where the file does.
    np.testing.assert_allclose(table.seconds, np.array(CONSTANT[24:]) - CONSTANT[24], atol=1e-9)


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


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_a_far_frame_costs_no_more_than_its_group_of_pictures(tmp_path: Path, decoded: list[int], name: str) -> None:
    path = tmp_path / name
    write_clip(path, [n / 10 for n in range(240)], time_base=Fraction(1, 10), gop=12, b_frames=2)
    path = str(path)
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
    monkeypatch.setattr(decoding.av, "open", lambda path, options: Misled(opened(path, options=options)))
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
    with pytest.raises(UserError, match=r"video '.*broken.mp4' cannot be decoded"):
        read_frame_table(str(path))


def test_a_damaged_picture_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mkv", CONSTANT, time_base=Fraction(1, 10))
    table = read_frame_table(str(path))
    with decoding.av.open(str(path)) as container:
        payload = max((bytes(packet) for packet in container.demux(video=0)), key=len)
    path.write_bytes(path.read_bytes().replace(payload, b"\xff" * len(payload)))
    with pytest.raises(UserError, match=r"clip.mkv'.* cannot be decoded"):
        list(decode_frames(str(path), table, range(N_FRAMES)))


def test_a_picture_that_had_to_be_made_up_is_an_error(tmp_path: Path) -> None:
    """FFmpeg fills in what a damaged slice leaves open, and decodes on; the pictures after it inherit the fault."""
    rng = np.random.default_rng(0)
    path = tmp_path / "clip.mkv"
    with decoding.av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.width = stream.height = 128
        stream.codec_context.gop_size = 20
        for _ in range(60):
            picture = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            container.mux(stream.encode(decoding.av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    table = read_frame_table(str(path))
    whole = list(decode_frames(str(path), table, [19, 25, 45]))
    with decoding.av.open(str(path)) as container:
        payload = [bytes(packet) for packet in container.demux(video=0)][22]
    noise = rng.integers(0, 256, 40, dtype=np.uint8).tobytes()
    damaged = payload[: len(payload) // 2] + noise + payload[len(payload) // 2 + 40 :]
    path.write_bytes(path.read_bytes().replace(payload, damaged))
    with pytest.raises(UserError, match=r"frame 25 at second 2\.500 cannot be decoded; the file is damaged there"):
        list(decode_frames(str(path), table, [19, 25]))
    for frame, expected in zip(decode_frames(str(path), table, [19, 45]), whole[::2], strict=True):
        np.testing.assert_array_equal(frame, expected)


def test_pictures_that_nothing_refers_to_are_decoded_only_when_wanted(tmp_path: Path, decoded: list[int]) -> None:
    options = {"x264-params": "scenecut=0:keyint=60:b-adapt=0:b-pyramid=normal"}
    path = str(write_clip(tmp_path / "clip.mp4", CONSTANT, time_base=Fraction(1, 10), b_frames=3, options=options))
    table = read_frame_table(path)
    assert table.keyframes == [0]
    [frame] = decode_frames(path, table, [57])
    assert number_in(frame) == 57
    assert len(set(decoded)) < 35
    decoded.clear()
    assert [number_in(frame) for frame in decode_frames(path, table, range(N_FRAMES))] == list(range(N_FRAMES))
    assert len(decoded) == N_FRAMES, "in one pass"


def test_an_hour_is_sampled_by_seeking_in_bounded_memory(tmp_path: Path, decoded: list[int]) -> None:
    seconds = [float(second) for second in range(3700)]
    options = {"preset": "ultrafast"}
    path = str(write_clip(tmp_path / "clip.mp4", seconds, time_base=Fraction(1, 1), gop=25, options=options))
    tracemalloc.start()
    table = read_frame_table(path)
    indices = spread_frames(table.seconds, table.fps, 0, len(table.seconds) - 1, 32)
    shown = [number_in(frame) for frame in decode_frames(path, table, indices)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.seconds[indices].tolist() == indices
    assert shown == [index % 256 for index in indices]
    assert len(set(decoded)) <= 32 * 25, "no more than a group of pictures for each frame"
    assert peak < 4_000_000


@pytest.mark.parametrize("name", ["clip.mkv", "clip.ts"])
@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_a_truncated_file_gives_right_frames_or_an_error_that_names_it(tmp_path: Path, name: str, share: float) -> None:
    path = write_clip(tmp_path / name, CONSTANT, time_base=Fraction(1, 10), b_frames=2)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    table = read_frame_table(str(path))
    assert 2 < len(table.seconds) < N_FRAMES
    np.testing.assert_allclose(table.seconds, np.round(table.seconds * 10) / 10, atol=1e-9)
    shown = []
    try:
        shown += map(number_in, decode_frames(str(path), table, range(len(table.seconds))))
    except UserError as error:
        shown.append(str(error))
    right = [round(second * 10) for second in table.seconds]
    assert shown in (right, [*right[: len(shown) - 1], shown[-1]])
    assert shown == right or name in shown[-1]


def test_a_file_without_pictures_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "sound.mka")
    with decoding.av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = decoding.av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match=r"sound.mka' holds no video stream"):
        read_frame_table(path)


def test_a_clip_of_one_frame_has_a_rate(tmp_path: Path) -> None:
    path = str(write_clip(tmp_path / "clip.mp4", [0.0], time_base=Fraction(1, 10)))
    table = read_frame_table(path)
    assert (table.seconds.tolist(), table.fps) == ([0.0], 10.0)

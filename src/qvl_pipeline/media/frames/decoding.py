"""Decoding chosen frames of a clip with PyAV, and the times at which the source shows them."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.opening import VIDEO_OPTIONS

# A seek restarts the decoder; with the keyframe it costs as much as 5 to 7 frames (H.264 of 360 and 1080 lines).
SEEK_COST_FRAMES = 8
# Their packets include frames that are never shown ("alternate reference"), so frames must be decoded to be counted.
HIDDEN_FRAME_CODECS = frozenset({"vp8"})
# No picture refers to one whose `nal_ref_idc` is 0 (H.264, 7.4.1): it need not be decoded unless it is wanted itself.
# HEVC's sub-layer non-reference pictures have no such promise: pictures of higher sub-layers may refer to them.
SKIPPABLE_CODECS = frozenset({"h264"})


MediaPath = str | os.PathLike[str]


@dataclass(frozen=True)
class FrameTable:
    """Every frame of a clip in the order of presentation.

    Attributes:
        pts: Presentation time of each frame in units of the stream's time base, strictly ascending int64 `[N]`.
        seconds: The same in seconds of the clip, float64 `[N]`.
        fps: Mean frame rate.
        keyframes: Frame numbers at which decoding can start, ascending.
        seek_times: Time to seek to for each of them, in units of the time base.
    """

    pts: np.ndarray
    seconds: np.ndarray
    fps: float
    keyframes: list[int]
    seek_times: list[int]


class _Packet(NamedTuple):
    """One packet: times in units of the time base, and whether its frame is a keyframe, and is shown at all."""

    pts: int
    dts: int | None
    is_key: bool
    is_shown: bool


class _ShortcutFailed(Exception):
    """Seeking or skipping did not lead to the frame that was asked for."""


def read_frame_table(path: MediaPath) -> FrameTable:
    """List the frames of a clip from its packets, without decoding a picture.

    Args:
        path: Video file, also one that is open (`OpenMedia`).

    Returns:
        The frame table of the first video stream.

    Raises:
        UserError: The file cannot be read, or holds no video.
    """
    with _open(path) as (container, stream):
        packets = [
            _Packet(packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard)
            for packet in container.demux(stream)
            if packet.size
        ]
        if stream.codec_context.name in HIDDEN_FRAME_CODECS or any(packet.pts is None for packet in packets):
            packets = [_Packet(pts, None, is_key=False, is_shown=True) for pts in _decoded_pts(path)]
        return _frame_table(path, container, stream, packets)


def decode_frames(path: MediaPath, table: FrameTable, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode chosen frames one by one; no more than one of them is held here at a time.

    Args:
        path: Video file.
        table: Its frame table.
        indices: Frame numbers, ascending; a frame may be asked for several times.

    Yields:
        RGB frames, uint8 `[H, W, 3]`, upright.

    Raises:
        UserError: A frame cannot be decoded, or only with guessed parts.
    """
    done = 0
    try:
        for frame in _decode(path, table, indices, shortcuts=True):
            yield frame
            done += 1
    except _ShortcutFailed:
        yield from _decode(path, table, indices[done:], shortcuts=False)


def open_container(path: MediaPath) -> av.container.InputContainer:
    """Open a file, if it is of a format that is read.

    Raises:
        UserError: It is of another one.
        FFmpegError: It is of none.
    """
    try:
        return av.open(os.fspath(path), options=VIDEO_OPTIONS)
    # What FFmpeg answers where a format is not among those allowed, or would open something else.
    except (av.ArgumentError, av.PermissionError):
        reason = "its format is not one of a video, or not one that is read"
        raise UserError(f"video '{path}' cannot be decoded ({reason}); run the pipeline 'validate'") from OSError(
            reason
        )


@contextmanager
def _open(path: MediaPath) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file and its first video stream; what FFmpeg cannot decode is an error that names the file."""
    try:
        with open_container(path) as container:
            if not container.streams.video:
                raise UserError(f"video '{path}' holds no video stream; run the pipeline 'validate'")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # clips are decoded side by side, each in a thread of its own
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(f"video '{path}' cannot be decoded ({error.strerror}); run the pipeline 'validate'") from error


def _frame_table(
    path: MediaPath, container: av.container.InputContainer, stream: av.VideoStream, packets: list[_Packet]
) -> FrameTable:
    """Sort packets into the order of presentation."""
    # Frames before the first keyframe refer to pictures that were cut away: no decoder returns them.
    first = min((packet.pts for packet in packets if packet.is_key), default=None)
    shown = [packet for packet in packets if packet.is_shown and (first is None or packet.pts >= first)]
    frames = {packet.pts: packet for packet in sorted(shown, key=lambda packet: packet.pts)}
    if not frames:
        raise UserError(f"video '{path}' holds no frames; run the pipeline 'validate'")
    pts = np.array(list(frames), dtype=np.int64)
    base = stream.time_base
    origin = int(clock_start(container) / base)
    seconds = (pts - origin) * base.numerator / base.denominator
    keyframes = [(number, packet) for number, packet in enumerate(frames.values()) if packet.is_key]
    # Formats of broadcasting are searched by decoding time, all others have an index of presentation times.
    by_decoding_time = _is_broadcast(container)
    return FrameTable(
        pts=pts,
        seconds=seconds,
        fps=_mean_fps(stream, seconds),
        keyframes=[number for number, _ in keyframes],
        seek_times=[
            packet.dts if by_decoding_time and packet.dts is not None else packet.pts for _, packet in keyframes
        ],
    )


def clock_start(container: av.container.InputContainer) -> Fraction:
    """Return the time in seconds at which the clock of a file starts: its second 0, as players and FFmpeg count.

    Formats of broadcasting (MPEG-TS, MPEG-PS) start their clock anywhere, and so does Matroska, where a recording was
    joined late or a part was cut out. All others start it at zero.
    """
    starts_anywhere = _is_broadcast(container) or "matroska" in container.format.name
    return Fraction(container.start_time or 0, av.time_base) if starts_anywhere else Fraction(0)


def _is_broadcast(container: av.container.InputContainer) -> bool:
    return bool(container.format.flags & av.format.Flags.ts_discont.value)


def _mean_fps(stream: av.VideoStream, seconds: np.ndarray) -> float:
    """The declared mean rate where the frames keep to it within 1 %, else the measured one."""
    declared = float(stream.average_rate or 0)
    if len(seconds) < 2:
        return declared or 1.0
    measured = (len(seconds) - 1) / (seconds[-1] - seconds[0])
    return declared if abs(declared / measured - 1) < 0.01 else float(measured)


def _decoded_pts(path: MediaPath) -> list[int]:
    """Presentation times by decoding everything, for files whose packets do not tell."""
    with _open(path) as (container, stream):
        return [_pts(frame) for frame in container.decode(stream)]


def _pts(frame: av.VideoFrame) -> int:
    pts = frame.pts if frame.pts is not None else frame.dts
    if pts is None:
        raise UserError("a video without any timestamps cannot be sampled: remux it, e.g. with ffmpeg -fflags +genpts")
    return pts


def _decode(path: MediaPath, table: FrameTable, indices: Sequence[int], *, shortcuts: bool) -> Iterator[np.ndarray]:
    """Decode in one pass; the shortcuts are to skip ahead by keyframe, and pictures that nothing refers to."""
    with _open(path) as (container, stream):
        skipped = shortcuts and stream.codec_context.name in SKIPPABLE_CODECS
        wanted = frozenset(table.pts[list(indices)].tolist()) if skipped else None
        decoded = _pictures(container, stream, wanted)
        to_rgb = VideoReformatter()  # one for all frames: setting it up costs more than converting a small frame
        picture, position = None, -1  # the frame last yielded, and its number
        for index in indices:
            if index != position or picture is None:
                nearest = bisect_right(table.keyframes, index) - 1
                # A seek restarts the decoder: that pays when it leaves out enough frames.
                if shortcuts and nearest >= 0 and table.keyframes[nearest] - position > SEEK_COST_FRAMES:
                    container.seek(table.seek_times[nearest], stream=stream)
                    keyframe = int(table.pts[table.keyframes[nearest]])
                    decoded = _from_keyframe(_pictures(container, stream, wanted), keyframe)
                picture = _upright(_advance(decoded, path, table, index, shortcuts), to_rgb)
                position = index
            yield picture


def _pictures(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: frozenset[int] | None
) -> Iterator[av.VideoFrame]:
    """Decode from here on; when it is known which pictures are wanted, without the others that nothing refers to.

    What FFmpeg had to make up is left out, up to the next keyframe: it would be shown as if it were the picture.
    """
    after_wanted = damaged = False
    for packet in container.demux(stream):
        if wanted is not None:
            is_wanted = packet.pts in wanted
            # The packet after a wanted one may hold the second field of the same picture.
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted or after_wanted else "NONREF"
            after_wanted = is_wanted
        for frame in packet.decode():
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if not damaged:
                yield frame


def _from_keyframe(decoded: Iterator[av.VideoFrame], pts: int) -> Iterator[av.VideoFrame]:
    """Leave out what precedes the keyframe at `pts`: it may lack its references."""
    started = False
    for frame in decoded:
        started = started or _pts(frame) == pts
        if started:
            yield frame
    if not started:
        raise _ShortcutFailed


def _advance(
    decoded: Iterator[av.VideoFrame], path: MediaPath, table: FrameTable, index: int, shortcuts: bool
) -> av.VideoFrame:
    wanted = int(table.pts[index])
    for frame in decoded:
        if _pts(frame) == wanted:
            return frame
        if _pts(frame) > wanted:
            break
    if shortcuts:
        raise _ShortcutFailed
    raise UserError(
        f"video '{path}': frame {index} at second {table.seconds[index]:.3f} cannot be decoded; the file is damaged "
        "there: repair it or leave it out"
    )


def _upright(frame: av.VideoFrame, to_rgb: VideoReformatter) -> np.ndarray:
    """RGB `[H, W, 3]` with the display rotation applied."""
    picture = to_rgb.reformat(frame, format="rgb24").to_ndarray()
    # FFmpeg's angle is that by which the stored picture must be turned counterclockwise.
    return np.ascontiguousarray(np.rot90(picture, k=round(frame.rotation / 90)))

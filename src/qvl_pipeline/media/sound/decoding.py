"""Decoding sound with PyAV: of a sound file, or of a video, as one channel at the rate that a model hears at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.decoding import MediaPath, clock_start
from qvl_pipeline.media.opening import VIDEO_OPTIONS

# Formats that do not say how long they are: FFmpeg guesses by the bit rate of the beginning.
_ESTIMATED = ("mp3", "aac")


class SoundError(UserError):
    """A file has no sound that can be read; the message says why, and does not name the file."""


@dataclass(frozen=True)
class SoundFacts:
    """What decoding all of a sound found.

    Attributes:
        codec: Codec.
        sample_rate: Samples a second of the file.
        channels: Channels of the file.
        declared_s: Seconds that the file claims; `None` where it claims nothing.
        duration_s: Seconds that were decoded.
        peak: Largest absolute value of the mean of the channels; 1 is full scale.
    """

    codec: str
    sample_rate: int
    channels: int
    declared_s: float | None
    duration_s: float
    peak: float


def read_sound(path: MediaPath, start: float | None, end: float | None, *, rate: int, longest_s: float) -> np.ndarray:
    """Decode the sound of a file, or a part of it.

    Channels are averaged, as librosa does it, and resampled by libswresample. Second 0 of a sound file is its first
    sample; second 0 of a video is that of its pictures, so that a sound that sets in late starts with silence.

    Args:
        path: Sound or video file, also one that is open (`OpenMedia`).
        start: First second, or `None`.
        end: Last second, or `None`.
        rate: Samples a second that are wanted.
        longest_s: Seconds of the longest sound that is wanted: decoding stops there.

    Returns:
        Float32 `[samples]`; 1 is full scale.

    Raises:
        SoundError: There is no sound, it cannot be decoded, or it is longer than `longest_s`.
    """
    first = round((start or 0.0) * rate)
    last = None if end is None else round(end * rate)
    most = round(longest_s * rate)
    taken: list[np.ndarray] = []
    count = 0
    with _open(path) as (container, stream):
        place = 0  # of the next sample, from second 0 on
        for number, samples in enumerate(_resampled(container, stream, rate)):
            if number == 0 and (offset := _offset(container, samples, rate)):
                taken += [np.zeros(max(0, min(offset, most + 1) - first), dtype=np.float32)]
                count, place = len(taken[0]), offset
            kept = samples.mono[max(0, first - place) : None if last is None else max(0, last - place)]
            place += len(samples.mono)
            taken.append(kept)
            count += len(kept)
            if count > most:
                raise SoundError(f"lasts longer than the {longest_s:g} s that a sound may have: use a part of it")
            if last is not None and place >= last:
                break
    found = np.concatenate([np.zeros(0, dtype=np.float32), *taken])
    return found if last is None else found[: last - first]


def probe_sound(path: MediaPath) -> SoundFacts:
    """Decode all of a sound, without keeping it, and say what it is.

    Args:
        path: Sound or video file.

    Raises:
        SoundError: There is none, it cannot be decoded, or not all of it is numbers.
    """
    with _open(path) as (container, stream):
        if not stream.rate or not stream.channels:
            raise SoundError("says that it has no channel, or no samples a second")
        estimated = container.format.name in _ESTIMATED or not stream.duration
        samples, peak = 0, 0.0
        for frame in container.decode(stream):
            mono = _mono(frame)
            if not np.isfinite(mono).all():
                raise SoundError("holds samples that are not finite")
            samples += len(mono)
            peak = max(peak, float(np.abs(mono).max(initial=0.0)))
        if not samples:
            raise SoundError("holds no samples: the file is cut off or damaged")
        return SoundFacts(
            codec=stream.codec_context.name,
            sample_rate=stream.rate,
            channels=stream.channels,
            declared_s=None if estimated else float(stream.duration * stream.time_base),
            duration_s=samples / stream.rate,
            peak=peak,
        )


@contextmanager
def _open(path: MediaPath) -> Iterator[tuple[av.container.InputContainer, av.AudioStream]]:
    try:
        with av.open(os.fspath(path), options=VIDEO_OPTIONS) as container:
            if not container.streams.audio:
                raise SoundError("holds no sound")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise SoundError("its sound is of no known codec: the file is cut off or damaged")
            stream.codec_context.thread_count = 1
            yield container, stream
    # What FFmpeg answers where a format is not among those allowed, or would open something else.
    except (av.ArgumentError, av.PermissionError) as error:
        raise SoundError("its format is not one of a sound, or not one that is read") from error
    except av.FFmpegError as error:
        raise SoundError(error.strerror) from error
    except ValueError as error:  # PyAV's resampler, of a stream whose rate or channels change
        raise SoundError(str(error)) from error


@dataclass(frozen=True)
class _Samples:
    """Mono samples, and the second at which the container shows the first of them."""

    mono: np.ndarray
    second: float


def _resampled(container: av.container.InputContainer, stream: av.AudioStream, rate: int) -> Iterator[_Samples]:
    resampler = av.AudioResampler(format="fltp", rate=rate)
    second = 0.0
    for frame in container.decode(stream):
        second = frame.time or 0.0
        yield from (_Samples(_mono(out), second) for out in resampler.resample(frame))
    yield from (_Samples(_mono(out), second) for out in resampler.resample(None) if out is not None)


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """Mean of the channels, float32 `[samples]`, of whatever form the samples have."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    if values.dtype.kind == "u":
        values = values.astype(np.float32) / 128 - 1
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / -float(np.iinfo(values.dtype).min)
    return values.mean(axis=0, dtype=np.float32)


def _offset(container: av.container.InputContainer, samples: _Samples, rate: int) -> int:
    """Samples by which the sound sets in after the pictures; negative where it begins before them."""
    if not container.streams.video:
        return 0
    return round((samples.second - float(clock_start(container))) * rate)

"""Sounds of a few tones, in files of any form."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def tone(seconds: float, rate: int = 16_000, hz: float = 440.0, level: float = 0.5) -> np.ndarray:
    """Float32 `[samples]` of a tone that gets slowly higher."""
    time = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hz * time * (1 + 0.1 * time))).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """Write float samples `[N]` or `[channels, N]` as 16 bits a sample."""
    channels = np.atleast_2d(samples)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T * 32767).round().astype("<i2").tobytes())
    return path


def write_sound(path: Path, samples: np.ndarray, rate: int = 16_000, codec: str = "flac") -> Path:
    """Encode float samples `[N]` with a codec, in the container that the file's ending names."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        _encode(container, stream, samples, rate)
    return path


def write_heard_clip(
    path: Path, frames: int, fps: int, samples: np.ndarray, rate: int = 16_000, late_s: float = 0.0
) -> Path:
    """Write a clip of grey pictures that get lighter, with a sound that sets in `late_s` seconds later."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "threads": "1"})
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=rate, layout="mono")
        for number in range(frames):
            picture = np.full((64, 64, 3), 40 + number * 150 // frames, dtype=np.uint8)
            picture[: 4 + number, :8] = 255
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(pictures.encode())
        _encode(container, sound, samples, rate, late_s)
    return path


def _encode(
    container: av.container.OutputContainer, stream: av.AudioStream, samples: np.ndarray, rate: int, late_s: float = 0.0
) -> None:
    start = round(late_s * rate)
    for begin in range(0, len(samples), 1024):
        part = samples[begin : begin + 1024]
        frame = av.AudioFrame.from_ndarray((part * 32767).round().astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start + begin, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())

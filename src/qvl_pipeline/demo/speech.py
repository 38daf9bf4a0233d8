"""Spoken digits, synthesised: each word is a sequence of vowels and hisses, said by a voice that differs every time."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

RATE = 16_000
# Centres of the first two formants in Hz (Peterson and Barney 1952, rounded), by vowel.
_VOWELS = {
    "i": (280, 2250),
    "e": (530, 1850),
    "a": (750, 1200),
    "o": (570, 850),
    "u": (310, 880),
    "r": (480, 1200),
}
# Centre of the noise of a hiss in Hz.
_HISSES = {"s": 5500, "f": 3500, "t": 4500, "k": 2000}
# Roughly how the digits sound: a vowel glides into the next, a hiss stands between.
WORDS = ("sirou", "uan", "tu", "fri", "for", "faif", "siks", "seven", "eit", "nain")
_SPELT = str.maketrans({"n": "e", "v": "u"})


def speak(rng: np.random.Generator, digit: int) -> np.ndarray:
    """Say a digit.

    Args:
        rng: Source of the voice: pitch, size of the speaker, speed, loudness, the room's noise, and when it begins.
        digit: 0 to 9.

    Returns:
        Samples of `RATE` a second, float32 `[samples]` within -1 to 1, between 0.3 and 0.7 seconds.
    """
    sounds = WORDS[digit].translate(_SPELT)
    size = rng.uniform(0.9, 1.15)  # of the speaker's mouth: all formants are higher or lower by it
    length = int(RATE * rng.uniform(0.07, 0.1))
    pieces = [_hiss(rng, _HISSES[sound] * size, length) if sound in _HISSES else np.zeros(length) for sound in sounds]
    voiced = np.repeat([sound in _VOWELS for sound in sounds], length)
    spoken = np.concatenate(pieces) + _vowels(rng, sounds, size, length) * _smooth(voiced.astype(float), length // 6)
    silence = [np.zeros(int(RATE * rng.uniform(0.02, 0.08))) for _ in range(2)]
    samples = np.concatenate([silence[0], spoken / np.abs(spoken).max(), silence[1]])
    samples = samples * rng.uniform(0.3, 0.9) + rng.normal(scale=0.003, size=len(samples))
    return np.clip(samples, -1, 1).astype(np.float32)


def write_speech(path: Path, samples: np.ndarray) -> None:
    """Write samples `[N]` as a WAV of 16 bits: without a codec, the bytes are the same everywhere."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())


def _vowels(rng: np.random.Generator, sounds: str, size: float, length: int) -> np.ndarray:
    """Harmonics of a falling pitch, louder the nearer they are to a formant; formants glide from vowel to vowel."""
    known = [sound for sound in sounds if sound in _VOWELS]
    # A hiss has the formants of the vowel before it, or else of the first.
    held, last = [], known[0]
    for sound in sounds:
        last = sound if sound in _VOWELS else last
        held.append(_VOWELS[last])
    centres = np.array(held, dtype=float) * size
    middles = (np.arange(len(sounds)) + 0.5) * length
    samples = np.arange(len(sounds) * length)
    formants = [np.interp(samples, middles, centres[:, number]) for number in range(2)]
    pitch = rng.uniform(90, 220) * np.linspace(1.1, 0.9, len(samples))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = np.zeros(len(samples))
    for harmonic in range(1, 30):
        hertz = pitch * harmonic
        loudness = sum(np.exp(-(((hertz - centre) / (60 + centre * 0.06)) ** 2)) for centre in formants)
        sound += np.where(hertz < RATE / 2, loudness, 0) * np.sin(harmonic * phase)
    return sound


def _hiss(rng: np.random.Generator, centre: float, length: int) -> np.ndarray:
    """Noise of one band that swells and fades."""
    noise = np.fft.rfft(rng.normal(size=length))
    hertz = np.fft.rfftfreq(length, 1 / RATE)
    shaped = np.fft.irfft(noise * np.exp(-(((hertz - centre) / 900) ** 2)), length)
    return 0.6 * shaped / np.abs(shaped).max() * np.hanning(length)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(values, np.ones(width) / width, mode="same")

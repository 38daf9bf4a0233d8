"""Spoken digits: the same for a seed, and told apart in the spectrograms that a model hears."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qvl_pipeline.demo.speech import RATE, speak, write_speech
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.sound.decoding import read_sound
from qvl_pipeline.media.sound.log_mel import log_mel

HEARING = FAMILIES["qwen2_5_omni"].hearing
STEPS = 16


def heard(rng: np.random.Generator, digit: int) -> np.ndarray:
    """Spectrogram of a digit, stretched to the same number of steps."""
    spectra = log_mel(speak(rng, digit), HEARING)
    return spectra[np.linspace(0, len(spectra) - 1, STEPS).round().astype(int)].ravel()


def test_the_same_seed_says_the_same_and_another_voice_something_else(tmp_path: Path) -> None:
    one, again, other = (speak(np.random.default_rng(seed), 3) for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    write_speech(tmp_path / "3.wav", one)
    read = read_sound(tmp_path / "3.wav", None, None, rate=RATE, longest_s=9)
    np.testing.assert_allclose(read, one, atol=1e-4)
    assert 0.2 < len(one) / RATE < 0.8
    assert 0.2 < np.abs(one).max() <= 1


def test_voices_that_were_never_heard_are_understood() -> None:
    """By the nearest mean of eight voices of each digit: what a model learns is there to be learnt."""
    rng = np.random.default_rng(0)
    means = np.stack([np.mean([heard(rng, digit) for _ in range(8)], axis=0) for digit in range(10)])
    guesses = [
        (digit, int(((means - heard(rng, digit)) ** 2).sum(axis=1).argmin())) for digit in range(10) for _ in "abc"
    ]
    assert np.mean([digit == guess for digit, guess in guesses]) >= 0.9

"""Log-mel spectrograms: what a model hears, made by transformers' own feature extractor."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from transformers import WhisperFeatureExtractor

from qvl_pipeline.families.hearing import Hearing


def log_mel(samples: np.ndarray, hearing: Hearing) -> np.ndarray:
    """Make the spectrogram of a sound.

    Processors fill every sound up to the longest there may be, minutes of silence; here no more than the last spectrum
    reaches into, which gives the same numbers.

    Args:
        samples: Float32 `[samples]`, at the rate that the family hears at, of at most `longest_s` seconds.
        hearing: How the family hears.

    Returns:
        Float32 `[spectra, bins]`.
    """
    hop, longest = hearing.hop_length, hearing.longest_s * hearing.sampling_rate
    filled = min(-(-(len(samples) + hearing.n_fft) // hop) * hop, longest)
    made = _extractor(hearing)(samples, sampling_rate=hearing.sampling_rate, max_length=filled)
    return np.ascontiguousarray(made["input_features"][0][:, : hearing.spectra(len(samples))].T, dtype=np.float32)


@lru_cache(maxsize=2)
def _extractor(hearing: Hearing) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(
        feature_size=hearing.mel_bins,
        sampling_rate=hearing.sampling_rate,
        hop_length=hearing.hop_length,
        n_fft=hearing.n_fft,
        chunk_length=hearing.longest_s,
    )

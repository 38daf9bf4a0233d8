"""Spectrograms against those of transformers' feature extractor, which fills every sound up to 300 seconds."""

from __future__ import annotations

import numpy as np
import pytest

from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.hearing import FEWEST_SPECTRA, audio_tokens
from qvl_pipeline.media.sound.log_mel import _extractor, log_mel
from tests.media.sounds import tone

HEARING = FAMILIES["qwen2_5_omni"].hearing


@pytest.mark.parametrize("samples", [479, 16_000, 16_001, 56_789])
def test_it_is_that_of_the_filled_up_sound(samples: int) -> None:
    sound = tone(4.0)[:samples] + np.random.default_rng(0).normal(scale=0.01, size=samples).astype(np.float32)
    expected = _extractor(HEARING)(sound, sampling_rate=16_000, return_attention_mask=True)
    length = expected["attention_mask"][0].sum()
    made = log_mel(sound, HEARING)
    assert made.shape == (length, 128)
    assert expected["input_features"].shape[-1] == 100 * HEARING.longest_s
    np.testing.assert_allclose(made, expected["input_features"][0][:, :length].T, atol=1e-4, rtol=0)


def test_tokens_of_so_many_spectra() -> None:
    # 25 a second; a sound of two spectra has none.
    assert [audio_tokens(spectra) for spectra in (1, 2, 3, 4, 100, 101, 200, 203, 30_000)] == [
        *(0, 0, 1, 1, 25, 25, 50, 51, 7500)
    ]
    assert audio_tokens(FEWEST_SPECTRA) == 1

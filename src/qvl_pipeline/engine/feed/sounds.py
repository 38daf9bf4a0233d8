"""The sounds of a micro-batch: a rank's share of them as inputs of the audio tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qvl_pipeline.engine.parallel.sequence_parallel import heard_spectra, split_sounds
from qvl_pipeline.errors import UserError
from qvl_pipeline.families.hearing import Hearing
from qvl_pipeline.media.sound.store import SoundStore

# Spectra of the sound of a rank that has none: they make a token.
_BLANK = 4


@dataclass(frozen=True)
class SoundReader:
    """Reads sounds for a model that hears.

    Attributes:
        store: Their spectrograms.
        hearing: How the family hears.
        config: Configuration of the model.
    """

    store: SoundStore
    hearing: Hearing
    config: Any

    def shares(self, media: Sequence[dict[str, Any]], degree: int) -> list[list[dict[str, Any]]]:
        """Share out the sounds among the media of a pack: see `split_sounds`."""
        return split_sounds(media, degree, self.hearing.chunk_of(self.config))

    def inputs(self, sounds: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
        """Make the inputs of the audio tower.

        Args:
            sounds: Entries of `media`, or parts of them; of none, a blank is made.

        Returns:
            The inputs, on the CPU, and the spectra of each sound.

        Raises:
            UserError: A sound cannot be read, or is not of the length that was planned.
        """
        lengths = [heard_spectra(item) for item in sounds] or [_BLANK]
        blank = torch.zeros(self.hearing.mel_bins, _BLANK)
        log_mel = torch.cat([self.log_mel(item) for item in sounds], dim=1) if sounds else blank
        return self.hearing.inputs(self.config, log_mel, lengths), lengths

    def log_mel(self, item: dict[str, Any]) -> torch.Tensor:
        """Read the spectrogram `[bins, spectra]` of a sound, or of the part of it that is this rank's.

        Raises:
            UserError: It cannot be read, or is not of the length that was planned.
        """
        part = slice(*item.get("heard_part", (None,)))
        log_mel = self.store.log_mel(item["type"], item["key"], part)
        if len(log_mel) != heard_spectra(item):
            raise UserError(
                f"sound '{item['key']}' has a spectrogram of another length in the store than the {item['spectra']} "
                "spectra that were planned: run the pipeline 'tokenize' again"
            )
        return torch.from_numpy(np.array(log_mel.T, order="C"))

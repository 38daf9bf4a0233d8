"""What a family does with sound: how a log-mel spectrogram is made of it, and which part of the model takes it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only declares its parameters need not wait for torch
    import torch
    from torch import nn

    AudioInputs = Callable[[Any, torch.Tensor, Sequence[int]], dict[str, Any]]
    AudioForward = Callable[[nn.Module, dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Hearing:
    """The sound side of a family. The spectrogram is Whisper's; published processors say so too, and are held to it.

    Attributes:
        sampling_rate: Samples a second that sounds are resampled to.
        mel_bins: Frequencies of a spectrogram.
        hop_length: Samples from one spectrum to the next.
        n_fft: Samples of a spectrum.
        longest_s: Seconds of the longest sound: transformers' processor would cut the rest off.
        encoder_layer: Class name of a layer of the audio tower; FSDP2 shards each.
        inputs: `(config, spectrograms [bins, N], spectra of each sound)` to the inputs of the audio tower, all that it
            would otherwise compute of lengths included, for which it waits for the device.
        forward: `(model, inputs)` to features `[tokens, H]`.
        chunk_of: Spectra that see each other in the audio tower, from its config: a sound may be cut between two such
            chunks with exactly the same features.
    """

    sampling_rate: int
    mel_bins: int
    hop_length: int
    n_fft: int
    longest_s: int
    encoder_layer: str
    inputs: AudioInputs
    forward: AudioForward
    chunk_of: Callable[[Any], int]

    def spectra(self, samples: int) -> int:
        """Spectra of a sound of so many samples."""
        return -(-samples // self.hop_length)


# Spectra of the shortest sound that has a token.
FEWEST_SPECTRA = 3
# Of a long one.
SPECTRA_PER_TOKEN = 4


def convolved(spectra: int) -> int:
    """Positions of the audio tower's layers that so many spectra become: its second convolution takes every other."""
    return (spectra - 1) // 2 + 1


def audio_tokens(spectra: int) -> int:
    """Tokens of the language model that so many spectra of one sound become: pairs of positions are averaged."""
    return (convolved(spectra) - 2) // 2 + 1

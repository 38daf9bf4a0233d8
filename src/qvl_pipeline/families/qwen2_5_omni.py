"""Qwen2.5-Omni's thinker: Qwen2.5-VL's tower and decoder, and an audio tower like Whisper's encoder.

What speaks (`talker`, `token2wav`) is no part of the module that is trained; an export has it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qvl_pipeline.families import qwen2_5_vl
from qvl_pipeline.families.family import GROUPS
from qvl_pipeline.families.hearing import Hearing, convolved

if TYPE_CHECKING:
    import torch
    from torch import nn


def _audio_inputs(config: Any, log_mel: torch.Tensor, spectra: Sequence[int]) -> dict[str, Any]:
    import torch
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

    lengths = torch.tensor(spectra)
    padded, chunks = omni.chunk_and_pad_features(log_mel, lengths, config.audio_config.n_window)
    return {
        "padded_feature": padded,
        "chunk_lengths": chunks,
        "valid_indices": omni.get_valid_indices(chunks),
        "pool_indices": omni.get_pool_indices(lengths),
        "cu_seqlens": omni.get_audio_cu_seqlens(chunks),
        "max_seqlen": convolved(int(chunks.max())),
    }


def _audio_forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model.audio_tower(return_dict=True, **inputs).last_hidden_state


# No lambda: how a family hears is sent to the processes that decode.
def _chunk_of(config: Any) -> int:
    return 2 * config.audio_config.n_window


FAMILY = replace(
    qwen2_5_vl.FAMILY,
    name="qwen2_5_omni",
    title="Qwen2.5-Omni",
    decoder_layer="Qwen2_5OmniDecoderLayer",
    vision_block="Qwen2_5OmniVisionBlock",
    groups=(("audio_projector", "model.audio_tower.proj."), ("audio", "model.audio_tower."), *GROUPS),
    tokens_per_second=lambda config: float(config.position_id_per_seconds),
    liger_kernels={"Qwen2_5OmniRMSNorm": "rms_norm", "Qwen2MLP": "swiglu", "Qwen2_5OmniMLP": "swiglu"},
    # Published as a part of the whole, and before transformers moved the decoder to `language_model`.
    hub_prefixes=(
        ("thinker.visual.", "model.visual."),
        ("thinker.audio_tower.", "model.audio_tower."),
        ("thinker.model.", "model.language_model."),
        ("thinker.lm_head.", "lm_head."),
        # A thinker alone, as transformers saves it.
        ("visual.", "model.visual."),
        ("audio_tower.", "model.audio_tower."),
        ("model.", "model.language_model."),
    ),
    kept_prefixes=("talker.", "token2wav."),
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    model_class="Qwen2_5OmniThinkerForConditionalGeneration",
    notes={"preflight": "what sounds take has been measured on a CPU only"},
    hearing=Hearing(
        sampling_rate=16_000,
        mel_bins=128,
        hop_length=160,
        n_fft=400,
        longest_s=300,
        encoder_layer="Qwen2_5OmniAudioEncoderLayer",
        inputs=_audio_inputs,
        forward=_audio_forward,
        chunk_of=_chunk_of,
    ),
)

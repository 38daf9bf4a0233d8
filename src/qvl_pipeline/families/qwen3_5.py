"""Qwen3.5 (and 3.6, 3.8 dense): Qwen3-VL's tower without DeepStack, three linear-attention layers to each full one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qvl_pipeline.families.family import NO_EXPERTS, ModelFamily
from qvl_pipeline.families.qwen3_vl import vision_inputs, vision_pairs

if TYPE_CHECKING:
    import torch
    from torch import nn


def _vision_forward(
    model: nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor, inputs: dict[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return model.visual(pixels, grid_thw=grid_thw, return_dict=True, **inputs).pooler_output, []


FAMILY = ModelFamily(
    name="qwen3_5",
    title="Qwen3.5",
    patch_size=16,
    limits_are_per_clip=True,
    decoder_layer="Qwen3_5DecoderLayer",
    vision_block="Qwen3_5VisionBlock",
    groups=(
        ("merger", "model.visual.merger."),
        ("vit", "model.visual."),
        ("embed", "model.language_model.embed_tokens."),
        ("llm", "model.language_model."),
        ("head", "lm_head."),
    ),
    vision_inputs=vision_inputs,
    vision_forward=_vision_forward,
    decoder_kwargs=lambda deepstack: {},
    tokens_per_second=lambda config: None,
    vision_pairs=vision_pairs,
    # The norm within linear attention is gated, and another one.
    liger_kernels={"Qwen3_5RMSNorm": "rms_norm_zero_centred", "Qwen3_5MLP": "swiglu"},
    linear_attention="Qwen3_5GatedDeltaNet",
    unsupported=NO_EXPERTS | {"preflight": "the memory of linear attention has not been measured"},
    notes={
        "packing": "with two packages on a GPU (model.linear_attn_implementation)",
        "sp": "degrees that divide the key heads of linear attention too",
        "liger": "but for the gated norm of linear attention",
    },
    # Multi-token prediction, which serving engines use to guess ahead; transformers has no module for it.
    kept_prefixes=("mtp.",),
)

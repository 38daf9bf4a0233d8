"""Qwen2.5-VL: window attention in the vision tower, absolute time in M-RoPE."""

from __future__ import annotations

import torch
from torch import nn

from qvl_pipeline.engine.families.family import ModelFamily


def _vision_forward(
    model: nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return model.visual(pixels, grid_thw=grid_thw, return_dict=True).pooler_output, []


FAMILY = ModelFamily(
    name="qwen2_5_vl",
    decoder_layer="Qwen2_5_VLDecoderLayer",
    vision_block="Qwen2_5_VLVisionBlock",
    groups=(
        ("merger", "model.visual.merger."),
        ("vit", "model.visual."),
        ("embed", "model.language_model.embed_tokens."),
        ("llm", "model.language_model."),
        ("head", "lm_head."),
    ),
    vision_forward=_vision_forward,
    decoder_kwargs=lambda mask, deepstack: {},
    tokens_per_second=lambda config: float(config.vision_config.tokens_per_second),
)

"""Qwen3-VL: DeepStack features into the first decoder layers, interleaved M-RoPE, timestamps in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvl_pipeline.families.family import NO_EXPERTS, ModelFamily

if TYPE_CHECKING:
    import torch
    from torch import nn


def _vision_forward(
    model: nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = model.visual(pixels, grid_thw=grid_thw, return_dict=True)
    return output.pooler_output, list(output.deepstack_features)


def vision_pairs(config: Any, grids: Sequence[Sequence[int]]) -> list[int]:
    """Every block attends within each frame."""
    return [sum(t * (h * w) ** 2 for t, h, w in grids)] * config.depth


FAMILY = ModelFamily(
    name="qwen3_vl",
    title="Qwen3-VL",
    patch_size=16,
    limits_are_per_clip=True,
    decoder_layer="Qwen3VLTextDecoderLayer",
    vision_block="Qwen3VLVisionBlock",
    groups=(
        ("deepstack", "model.visual.deepstack_merger_list."),
        ("merger", "model.visual.merger."),
        ("vit", "model.visual."),
        ("embed", "model.language_model.embed_tokens."),
        ("llm", "model.language_model."),
        ("head", "lm_head."),
    ),
    vision_forward=_vision_forward,
    decoder_kwargs=lambda mask, deepstack: {"visual_pos_masks": mask, "deepstack_visual_embeds": deepstack},
    tokens_per_second=lambda config: None,
    vision_pairs=vision_pairs,
    unsupported=NO_EXPERTS,
    # The vision tower has LayerNorms and plain MLPs.
    liger_kernels={"Qwen3VLTextRMSNorm": "rms_norm", "Qwen3VLTextMLP": "swiglu"},
)

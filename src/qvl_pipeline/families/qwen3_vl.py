"""Qwen3-VL: DeepStack features into the first decoder layers, interleaved M-RoPE, timestamps in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvl_pipeline.families.family import GROUPS, NO_EXPERTS, ModelFamily

if TYPE_CHECKING:
    import torch
    from torch import nn


def _vision_inputs(config: Any, grid_thw: torch.Tensor) -> dict[str, Any]:
    """Return what the tower would compute from the grid, with the host waiting for it."""
    from transformers import vision_utils

    merge = config.spatial_merge_size
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid_thw,
        num_grid_per_side=int(config.num_position_embeddings**0.5),
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=merge,
    )
    bounds = vision_utils.get_vision_cu_seqlens(grid_thw)
    return {
        "interp_indices": indices,
        "interp_weights": weights,
        "position_ids": vision_utils.get_vision_position_ids(grid_thw, merge),
        "cu_seqlens": bounds,
        "max_seqlen": int(bounds.diff().max()),
    }


def _vision_forward(
    model: nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor, inputs: dict[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = model.visual(pixels, grid_thw=grid_thw, return_dict=True, **inputs)
    return output.pooler_output, list(output.deepstack_features)


def _decoder_kwargs(deepstack: list[torch.Tensor]) -> dict[str, Any]:
    """Add features `[B, T, H]` to whole rows, of which these are the numbers.

    transformers reads and writes `hidden[visual_pos_masks, :]`. A mask of placeholders would do so by their number,
    which the host waits for the device to count, five times a level; the numbers of the rows need no counting.
    """
    import torch

    rows = torch.arange(len(deepstack[0]), device=deepstack[0].device)
    return {"visual_pos_masks": rows, "deepstack_visual_embeds": deepstack}


def _vision_pairs(config: Any, grids: Sequence[Sequence[int]]) -> list[int]:
    """Every block attends within each frame."""
    return [sum(t * (h * w) ** 2 for t, h, w in grids)] * config.depth


FAMILY = ModelFamily(
    name="qwen3_vl",
    title="Qwen3-VL",
    patch_size=16,
    limits_are_per_clip=True,
    decoder_layer="Qwen3VLTextDecoderLayer",
    vision_block="Qwen3VLVisionBlock",
    groups=(("deepstack", "model.visual.deepstack_merger_list."), *GROUPS),
    vision_inputs=_vision_inputs,
    vision_forward=_vision_forward,
    decoder_kwargs=_decoder_kwargs,
    tokens_per_second=lambda config: None,
    vision_pairs=_vision_pairs,
    unsupported=NO_EXPERTS,
    # The vision tower has LayerNorms and plain MLPs.
    liger_kernels={"Qwen3VLTextRMSNorm": "rms_norm", "Qwen3VLTextMLP": "swiglu"},
)

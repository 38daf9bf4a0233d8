"""Qwen2.5-VL: window attention in the vision tower, absolute time in M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvl_pipeline.families.family import GROUPS, NO_EXPERTS, ModelFamily

if TYPE_CHECKING:
    import torch
    from torch import nn


def _vision_inputs(config: Any, grid_thw: torch.Tensor) -> dict[str, Any]:
    """Positions and bounds of frames and windows."""
    from transformers import vision_utils

    merge = config.spatial_merge_size
    bounds = vision_utils.get_vision_cu_seqlens(grid_thw)
    window_index, windows = vision_utils.get_vision_window_index(
        grid_thw, spatial_merge_size=merge, window_size=config.window_size, patch_size=config.patch_size
    )
    return {
        "position_ids": vision_utils.get_vision_position_ids(grid_thw, merge),
        "cu_seqlens": bounds,
        "max_seqlen": int(bounds.diff().max()),
        "window_index": window_index,
        "cu_window_seqlens": windows,
        "max_window_seqlen": int(windows.diff().max()),
    }


def _vision_forward(
    model: nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor, inputs: dict[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features of the merged patches; there is no DeepStack."""
    return model.visual(pixels, grid_thw=grid_thw, return_dict=True, **inputs).pooler_output, []


def _vision_pairs(config: Any, grids: Sequence[Sequence[int]]) -> list[int]:
    """A few blocks attend within each frame, the others within windows of merged patches, smaller at the edges."""
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size

    def squares(patches: int) -> int:
        whole, rest = divmod(patches // merge, side)
        return whole * side**2 + rest**2

    frame = sum(t * (h * w) ** 2 for t, h, w in grids)
    window = sum(t * merge**4 * squares(h) * squares(w) for t, h, w in grids)
    return [frame if block in config.fullatt_block_indexes else window for block in range(config.depth)]


FAMILY = ModelFamily(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    patch_size=14,
    limits_are_per_clip=False,
    decoder_layer="Qwen2_5_VLDecoderLayer",
    vision_block="Qwen2_5_VLVisionBlock",
    groups=GROUPS,
    vision_inputs=_vision_inputs,
    vision_forward=_vision_forward,
    decoder_kwargs=lambda deepstack: {},
    tokens_per_second=lambda config: float(config.vision_config.tokens_per_second),
    vision_pairs=_vision_pairs,
    # The vision MLPs have biases, which change nothing: the kernel computes what lies between the linears.
    liger_kernels={"Qwen2_5_VLRMSNorm": "rms_norm", "Qwen2MLP": "swiglu", "Qwen2_5_VLMLP": "swiglu"},
    fastest_blocks="compiled",
    unsupported=NO_EXPERTS,
    # Published before transformers moved the decoder to `language_model`.
    hub_prefixes=(("visual.", "model.visual."), ("model.", "model.language_model.")),
)

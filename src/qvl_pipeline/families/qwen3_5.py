"""Qwen3.5 (and 3.6, 3.8 dense): Qwen3-VL's tower without DeepStack, three linear-attention layers to each full one."""

from __future__ import annotations

from dataclasses import replace

from qvl_pipeline.families import qwen2_5_vl, qwen3_vl
from qvl_pipeline.families.family import GROUPS, NO_EXPERTS

FAMILY = replace(
    qwen3_vl.FAMILY,
    name="qwen3_5",
    title="Qwen3.5",
    decoder_layer="Qwen3_5DecoderLayer",
    vision_block="Qwen3_5VisionBlock",
    groups=GROUPS,
    vision_forward=qwen2_5_vl.FAMILY.vision_forward,
    decoder_kwargs=qwen2_5_vl.FAMILY.decoder_kwargs,
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

"""Qwen3.5 (and 3.6) with a mixture of experts, and one that every token goes to: 35B-A3B, 122B-A10B, 397B-A17B."""

from __future__ import annotations

from dataclasses import replace

from qvl_pipeline.families import qwen3_5, qwen3_vl_moe

FAMILY = replace(
    qwen3_5.FAMILY,
    name="qwen3_5_moe",
    title="Qwen3.5-MoE",
    decoder_layer="Qwen3_5MoeDecoderLayer",
    vision_block="Qwen3_5MoeVisionBlock",
    linear_attention="Qwen3_5MoeGatedDeltaNet",
    experts="Qwen3_5MoeExperts",
    router="Qwen3_5MoeTopKRouter",
    # The MLP is the shared expert; the others are one fused matrix product, which no kernel of Liger's takes.
    liger_kernels={"Qwen3_5MoeRMSNorm": "rms_norm_zero_centred", "Qwen3_5MoeMLP": "swiglu"},
    unsupported=qwen3_vl_moe.FAMILY.unsupported
    | {"preflight": "the memory of experts and of linear attention has not been measured"},
    notes=qwen3_vl_moe.FAMILY.notes
    | qwen3_5.FAMILY.notes
    | {
        "adapters": "of attention, the shared expert and the vision side, and LoRA of each expert by {llm: [experts]}",
        "liger": "norms and the shared expert, but for the gated norm of linear attention",
    },
)

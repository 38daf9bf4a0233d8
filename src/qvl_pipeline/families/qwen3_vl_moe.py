"""Qwen3-VL with a mixture of experts in the language model: 30B-A3B, 235B-A22B."""

from __future__ import annotations

from dataclasses import replace

from qvl_pipeline.families import qwen3_vl

FAMILY = replace(
    qwen3_vl.FAMILY,
    name="qwen3_vl_moe",
    title="Qwen3-VL-MoE",
    decoder_layer="Qwen3VLMoeTextDecoderLayer",
    vision_block="Qwen3VLMoeVisionBlock",
    experts="Qwen3VLMoeTextExperts",
    router="Qwen3VLMoeTextTopKRouter",
    # Experts are one fused matrix product, which no kernel of Liger's takes.
    liger_kernels={"Qwen3VLMoeTextRMSNorm": "rms_norm"},
    unsupported={
        "quantized_base": "its experts, most of the model, are fused tensors, and only linear layers are quantised",
        "ep": "not built, experts are sharded by FSDP2 alone (docs/training.md says what is missing)",
        "preflight": "the memory of experts has not been measured",
        "compile": "what routers decide is recorded outside of the graphs",
    },
    notes={
        "adapters": "of attention and the vision side, and LoRA of each expert by {llm: [experts]}",
        "liger": "norms only",
        "muon": "of matrices; the fused tensors of experts are trained by AdamW",
    },
    transposed_in_hub=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)

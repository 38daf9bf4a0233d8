"""FLOPs: derived by hand for the tiny models, and as torch counts them while the real models run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from benchmarks.gpu import NO_ADAPTER
from torch.utils.flop_counter import FlopCounterMode

from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.model.adapters.injection import inject, quantize_base
from qvl_pipeline.engine.model.adapters.values import fill_quantized
from qvl_pipeline.engine.model.attention.linear import KERNELS, use_packed_linear_attention
from qvl_pipeline.engine.model.attention.packed import use_packed_attention
from qvl_pipeline.engine.model.flops import flops_of, peak_flops, peak_flops_by_name
from qvl_pipeline.engine.model.freezing import freeze
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from tests.engine.model.test_linear_attention import token_by_token

# What torch counts beyond the model's work: the tables of rotary angles are a product of matrices as well.
TOLERANCE = 1e-3


def counted(packed: PackedVLM, batch: Batch) -> int:
    """FLOPs of forward and backward as torch sees them; eager attention is made of products it can count."""
    use_packed_attention(packed.hf, "eager", "eager", torch.device("cpu"))
    if packed.family.experts:  # of grouped products torch knows no FLOPs
        packed.hf.config.text_config._experts_implementation_internal = "eager"
    if packed.family.linear_attention:
        with mock.patch.dict(KERNELS, torch=token_by_token):
            use_packed_linear_attention(packed.hf, packed.family, "torch", torch.device("cpu"))
    with FlopCounterMode(display=False) as mode:
        packed(batch).sum().backward()
    return mode.get_total_flops()


def masked_pairs(batch: Batch) -> float:
    """Pairs that eager attention computes and then masks: the keys after each query, and those of rounded lengths."""
    lengths = batch.cu_seqlens.diff().tolist()
    rounded = [-(-length // 8) * 8 for length in lengths]  # below 64 tokens the attention rounds up to eighths
    return sum(r * r - n * (n + 1) / 2 for r, n in zip(rounded, lengths, strict=True))


def batch_of(builder: BatchBuilder, samples: dict[str, dict[str, Any]], kinds: Sequence[str]) -> Batch:
    return builder.build([samples[kind] for kind in kinds], vision=True)


@pytest.mark.parametrize(
    "frozen",
    [(), ("visual",), ("llm", "embed"), ("visual", "embed"), ("vit", "llm", "embed"), ("model.visual.blocks.0.*",)],
    ids=str,
)
def test_flops_are_those_that_torch_counts(
    packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict[str, Any]], frozen: tuple[str, ...]
) -> None:
    freeze(packed.hf, packed.family, frozen)
    flops = flops_of(packed)
    batch = batch_of(builder, samples, ["image_and_video", "text", "two_images"])
    masked = masked_pairs(batch) * flops.per_text_pair
    assert flops.count(batch) + masked == pytest.approx(counted(packed, batch), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "targets", "init", "dropout", "train_fully", "base"),
    [
        # What is not named is frozen: here all of the vision side.
        ("lora", {"llm": "all"}, "zeros_b", 0.0, (), "none"),
        ("dora", {"llm": "all"}, "zeros_b", 0.0, (), "none"),
        ("dora", {"llm": "all"}, "zeros_b", 0.1, (), "nf4"),
        ("lora", {"llm": ["mlp"], "visual": "all"}, "zeros_b", 0.0, (), "none"),
        ("dora", {"llm": ["mlp"], "visual": "all"}, "zeros_b", 0.0, (), "none"),
        ("dora", {"llm": ["attention"]}, "zeros_b", 0.0, ("visual",), "none"),
        ("lora", {"merger": "all"}, "pissa", 0.0, (), "none"),
        ("lora", {"llm": ["attention"], "merger": "all"}, "zeros_b", 0.0, (), "nf4"),
    ],
    ids=str,
)
def test_flops_of_adapters_are_those_that_torch_counts(
    family: str,
    packed: PackedVLM,
    builder: BatchBuilder,
    samples: dict[str, dict[str, Any]],
    kind: str,
    targets: dict,
    init: str,
    dropout: float,
    train_fully: tuple[str, ...],
    base: str,
) -> None:
    if family == "qwen3_vl_moe" and "mlp" in targets.get("llm", ()):
        targets = targets | {"llm": ["attention"]}  # experts are no linear layers
    if packed.family.experts and kind == "lora" and "llm" in targets and base == "none":
        targets = targets | {"llm": ["attention", "experts"] if targets["llm"] == "all" else ["experts"]}
    asked = {"dropout": dropout, "init": init, "targets": targets, "train_fully": train_fully, "quantize_base": base}
    spec = dataclasses.replace(NO_ADAPTER, type=kind, **asked)
    packed.train()
    inject(packed.hf, packed.family, spec)
    if spec.quantizes:
        matrices = {name: weight.clone() for name, weight in packed.hf.named_parameters()}
        quantize_base(packed.hf, packed.family, spec)
        for name, layer in quantized_layers(packed.hf):
            fill_quantized(layer, matrices[f"{name}.weight"])
    for name, parameter in packed.hf.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    flops = flops_of(packed)
    batch = batch_of(builder, samples, ["image_and_video", "text", "two_images"])
    masked = masked_pairs(batch) * flops.per_text_pair
    assert flops.count(batch) + masked == pytest.approx(counted(packed, batch), rel=TOLERANCE)


def test_golden_flops_of_the_tiny_model(family: str, packed: PackedVLM, builder: BatchBuilder) -> None:
    """One image of 4 x 8 patches (8 tokens), 20 tokens, 5 of them supervised; everything is trained.

    Decoder: 3 layers of q 128x128, k and v 128x64, o 128x128, and three of 128x384. Tower: 2 blocks of qkv 96x288 and
    proj 96x96; Qwen3-VL's MLP has two matrices of 96x192 and it merges three times (384x384, 384x128), Qwen2.5-VL's
    has three and it merges once. A matrix costs 2 FLOPs a weight forward and 4 backward, except the patch embedding,
    whose input is pixels and needs no gradient: 2 + 2.

    Qwen3.5 has one such layer, whose q is gated (128x256), between two of linear attention: 256 channels of queries,
    keys and values, 128 of the gate, two scalars for each of 8 heads, filters of 4, an output of 128x128, and a state
    of 16x16 a head that is read, written and read.
    """
    config = packed.hf.config
    ids = [config.vision_start_token_id, *[config.image_token_id] * 8, config.vision_end_token_id, *range(100, 110)]
    media = [{"type": "image", "key": "a", "grid_t": 1, "grid_h": 4, "grid_w": 8, "seconds_per_grid": 0.0}]
    sample = {"sample_id": "s", "source": "a", "input_ids": ids, "label_spans": torch.tensor([[15, 20]]).numpy()}
    batch = builder.build([sample | {"media": media}], vision=True)
    softmax, mlp_of_text, pairs_of_text = 2 * 128 * 128 + 2 * 128 * 64, 3 * 128 * 384, 12 * 128 * (20 * 21 // 2)
    if packed.family.experts:  # two experts of 128x96 for each token, of eight between which a matrix chooses
        mlp_of_text = 2 * 3 * 128 * 96 + 128 * 8
    if family == "qwen3_5_moe":  # and one more of the same size, with a gate
        mlp_of_text += 3 * 128 * 96 + 128
    decoder = 3 * (6 * 20 * (softmax + mlp_of_text) + pairs_of_text)
    if packed.family.linear_attention:
        linear = 128 * (256 + 128 + 2 * 8) + 4 * 256 + 128 * 128 + 3 * 8 * 16 * 16
        decoder = 6 * 20 * (softmax + 128 * 128 + 2 * linear + 3 * mlp_of_text) + pairs_of_text
    head = 6 * 5 * 128 * config.text_config.vocab_size
    mlp, mergers, patch, pairs = {
        # All 32 patches see each other in both blocks.
        "qwen3_vl": (2 * 96 * 192, 3, 3 * 2 * 16 * 16, 2 * 32 * 32),
        "qwen3_vl_moe": (2 * 96 * 192, 3, 3 * 2 * 16 * 16, 2 * 32 * 32),
        "qwen3_5": (2 * 96 * 192, 1, 3 * 2 * 16 * 16, 2 * 32 * 32),
        "qwen3_5_moe": (2 * 96 * 192, 1, 3 * 2 * 16 * 16, 2 * 32 * 32),
        # Block 1 sees the image, block 0 windows of 2 x 2 patches: 8 windows of 4.
        "qwen2_5_vl": (3 * 96 * 192, 1, 3 * 2 * 14 * 14, 32 * 32 + 8 * 4 * 4),
    }[family]
    tower = 32 * (4 * patch * 96 + 6 * 2 * (4 * 96 * 96 + mlp)) + 12 * 96 * pairs
    merging = 8 * 6 * mergers * (384 * 384 + 384 * 128)
    assert flops_of(packed).count(batch) == decoder + head + tower + merging


def test_a_blank_image_is_no_work(packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict[str, Any]]) -> None:
    alone = builder.build([samples["text"]], vision=False)
    beside_media = builder.build([samples["text"]], vision=True)
    assert flops_of(packed).count(alone) == flops_of(packed).count(beside_media)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA H200", 9.89e14),
        ("NVIDIA H20", 1.48e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA GeForce RTX 4090", 1.652e14),
        ("NVIDIA L40S", 3.62e14),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops_by_name(name) == peak


def test_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu")) is None

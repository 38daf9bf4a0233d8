"""Speed, memory and numerics on one GPU: packs against padded batches, attention kernels, Liger.

`python -m benchmarks.gpu [--models …] [--steps 5] [--tiny]`: random weights of Qwen-VL dimensions, so nothing is
downloaded; packs of 16,384 tokens with images. It needs what the engine needs and nothing more. `--tiny` is a small
model on whatever device there is. Weights are bfloat16 here and there is no optimizer, so that forward and backward of
every model fit and are compared alike. What a device cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from benchmarks.report import print_table, report
from qvl_pipeline.engine.attention import use_packed_attention
from qvl_pipeline.engine.batch import Batch, BatchBuilder
from qvl_pipeline.engine.families import FAMILIES
from qvl_pipeline.engine.flops import flops_of, peak_flops
from qvl_pipeline.engine.kernels import use_liger_kernels
from qvl_pipeline.engine.packed_vlm import PackedVLM
from qvl_pipeline.engine.patch_embedding import use_linear_patch_embedding

_IDS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
_TEXT = {"vocab_size": 151_936, "max_position_embeddings": 128_000, "bos_token_id": None, "eos_token_id": None}
_ROPE3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
_ROPE25 = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_VISION25 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
_VISION25 |= {"fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "tokens_per_second": 2}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads, kv_heads), strict=True))


# The dimensions of the models' own configs.
MODELS: dict[str, Any] = {
    "qwen3_vl_4b": Qwen3VLConfig(
        text_config=_TEXT | _sizes(2560, 9728, 36, 32, 8) | {"head_dim": 128, "rope_parameters": _ROPE3},
        vision_config={"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16}
        | {"out_hidden_size": 2560, "patch_size": 16}
        | {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304},
        tie_word_embeddings=True,
        **_IDS,
    ),
    "qwen2_5_vl_3b": Qwen2_5_VLConfig(
        text_config=_TEXT | _sizes(2048, 11008, 36, 16, 2) | {"rope_parameters": _ROPE25},
        vision_config=_VISION25 | {"out_hidden_size": 2048},
        tie_word_embeddings=True,
        **_IDS,
    ),
    "qwen2_5_vl_7b": Qwen2_5_VLConfig(
        text_config=_TEXT | _sizes(3584, 18944, 28, 28, 4) | {"rope_parameters": _ROPE25, "vocab_size": 152_064},
        vision_config=_VISION25 | {"out_hidden_size": 3584},
        tie_word_embeddings=False,
        **_IDS,
    ),
}
TINY = {
    "tiny_qwen3_vl": Qwen3VLConfig(
        text_config=_TEXT | _sizes(64, 128, 2, 4, 2) | {"head_dim": 128, "rope_parameters": _ROPE3, "vocab_size": 512},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        | {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        tie_word_embeddings=True,
        **_IDS,
    )
}
ATTENTION = ("flash_attention_3", "flash_attention_2", "torch_varlen", "sdpa")


@dataclass
class RandomPatches:
    """Stands in for the patch loader: random pixels, made once."""

    values: int

    def load(self, media: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Make the patches `[N, values]` of some media."""
        patches = sum(item["grid_t"] * item["grid_h"] * item["grid_w"] for item in media)
        return torch.randint(0, 256, (patches, self.values), dtype=torch.uint8)


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--tiny", action="store_true", help="a small model, on any device")
    options = parser.parse_args()
    configs = TINY if options.tiny else {name: MODELS[name] for name in options.models}
    rows, ratios = compare(configs, 256 if options.tiny else options.tokens, 1 if options.tiny else options.steps)
    report("gpu", rows, ratios=ratios, targets={"best_mfu": ">= 0.40"})


def compare(configs: dict[str, Any], tokens: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure every model under every kernel that runs here, and print the numerics.

    Returns:
        One row for each combination, and the ratios.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, config in configs.items():
        print_table(numerics(config, device))
        for attention in ATTENTION:
            for liger in (False, True) if device.type == "cuda" else (False,):
                rows.append({"model": name, **measure(config, device, attention, liger, tokens, steps)})
        rows.append({"model": name, **measure(config, device, "padded", False, tokens, steps)})
    ratios = {}
    for name in configs:
        speeds = [(row["attention"], row["tokens_per_second"] or 0.0) for row in rows if row["model"] == name]
        packed = max(speed for attention, speed in speeds if attention != "padded")
        if padded := speeds[-1][1]:
            ratios[f"{name}_packed_to_padded_tokens_per_second"] = packed / padded
    if mfus := [row["mfu"] for row in rows if row["mfu"]]:
        ratios["best_mfu"] = max(mfus)
    return rows, ratios


def measure(config: Any, device: torch.device, attention: str, liger: bool, tokens: int, steps: int) -> dict[str, Any]:
    """Time forward and backward; `padded` has a row for each sample and SDPA with a mask, as a Trainer would."""
    row: dict[str, Any] = {"attention": attention, "liger": liger, "tokens_per_second": None, "mfu": None}
    row |= {"step_s": None, "memory_gib": None, "note": ""}
    try:
        padded = attention == "padded"
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build(config, device, torch.bfloat16, "sdpa" if padded else attention, liger, rmpad=not padded)
        batch = make_batch(config, tokens, rmpad=not padded)
        flops = flops_of(model).count(batch)
        batch = batch.to(device)
        times = [_timed(lambda: model(batch).mean().backward(), model, device) for _ in range(steps + 1)][1:]
    except (ValueError, torch.OutOfMemoryError) as error:
        return row | {"note": str(error).splitlines()[0][:60]}
    seconds, peak = float(np.median(times)), peak_flops(device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    row |= {"tokens_per_second": sum(batch.lengths) / seconds, "step_s": seconds, "memory_gib": memory}
    return row | {"mfu": flops / seconds / peak if peak else None}


def _timed(action: Any, model: nn.Module, device: torch.device) -> float:
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def numerics(config: Any, device: torch.device) -> list[dict[str, Any]]:
    """Largest relative error of loss and gradients of each kernel, against eager attention in float32."""
    batch = make_batch(config, 512, rmpad=True).to(device)
    expected = _loss_and_gradients(build(config, device, torch.float32, "eager", False), batch)
    rows = []
    for attention in ATTENTION:
        for dtype in (torch.float32, torch.bfloat16):
            for liger in (False, True) if device.type == "cuda" else (False,):
                row = {"attention": attention, "dtype": str(dtype).removeprefix("torch."), "liger": liger}
                try:
                    loss, gradients = _loss_and_gradients(build(config, device, dtype, attention, liger), batch)
                except (ValueError, RuntimeError) as error:
                    rows.append(row | {"loss_error": None, "gradient_error": None, "note": str(error)[:60]})
                    continue
                errors = [
                    float((g - e).norm() / e.norm()) for g, e in zip(gradients, expected[1], strict=True) if e.norm()
                ]
                error = {"loss_error": abs(loss / expected[0] - 1), "gradient_error": max(errors)}
                rows.append(row | error | {"note": ""})
    return rows


def _loss_and_gradients(model: PackedVLM, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    loss = model(batch).mean()
    loss.backward()
    return float(loss.detach()), [p.grad.float().cpu() for p in model.parameters()]


def build(
    config: Any, device: torch.device, dtype: torch.dtype, attention: str, liger: bool, *, rmpad: bool = True
) -> PackedVLM:
    """Build a model with random weights, the same whatever the kernels."""
    torch.manual_seed(0)
    with device:
        hf = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
    hf.train()
    family = FAMILIES[config.model_type]
    use_linear_patch_embedding(hf)
    use_packed_attention(hf, attention, attention, device, half=dtype == torch.bfloat16, rmpad=rmpad)
    if liger:
        use_liger_kernels(hf, family, device)
    return PackedVLM(hf, family, [0.5] * 3, [0.5] * 3).to(device)


def make_batch(config: Any, tokens: int, *, rmpad: bool) -> Batch:
    """A pack of skewed samples, two in three with an image."""
    rng = np.random.default_rng(0)
    samples, left = [], tokens
    while left > 64:
        text = int(min(left - 40, np.clip(rng.lognormal(5.5, 0.9), 16, tokens // 2)))
        side = 2 * int(min(rng.integers(2, 20), (left - text - 4) ** 0.5)) if len(samples) % 3 else 0
        samples.append(_sample(config, rng, text, side, len(samples)))
        left -= len(samples[-1]["input_ids"])
    values = 3 * 2 * config.vision_config.patch_size**2
    speed = FAMILIES[config.model_type].tokens_per_second(config)
    builder = BatchBuilder(RandomPatches(values), values, (1, 2), speed, ("benchmark",), rmpad=rmpad)
    return builder.build(samples, vision=True)


def _sample(config: Any, rng: np.random.Generator, text: int, side: int, number: int) -> dict[str, Any]:
    image = [3, *[1] * (side * side // 4), 4] if side else []
    ids = np.array([*image, *rng.integers(10, 500, size=text)], dtype=np.int32)
    medium = {"type": "image", "key": "", "grid_t": 1, "grid_h": side, "grid_w": side, "seconds_per_grid": 0.0}
    return {
        "sample_id": str(number),
        "source": "benchmark",
        "input_ids": ids,
        "label_spans": np.array([[len(ids) - text // 2, len(ids)]], dtype=np.int32),
        "media": [medium] if side else [],
    }


if __name__ == "__main__":
    main()

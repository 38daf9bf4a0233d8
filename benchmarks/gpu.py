"""Training speed, memory and numerics on one GPU: the engine under each attention kernel, and transformers' own model.

`python -m benchmarks.gpu [--models …] [--steps 5] [--tiny]`: random weights of Qwen-VL dimensions, so nothing is
downloaded; steps of 16,384 tokens with images. It needs what the engine needs and nothing more. `--tiny` is a small
model of each family on whatever device there is. What a device cannot run is a row that says why. Each row is in
`results/gpu_<model>.json` as soon as it is measured. Numerics are of the same widths with a few layers.

A step is whole: the batch to the device, forward, backward, clipping, fused AdamW. Weights, gradients and optimizer
state are float32 and the computation is bfloat16: in ours by FSDP2's policy, as the engine trains, in the comparator by
autocast, as transformers' Trainer does. The comparator is the model of transformers with its own forward pass and loss,
on padded rows of the same samples, with gradients accumulated over as many rows at a time as fit into memory. It is
measured as it comes, and with our patch embedding in place of its Conv3d. Activations are kept where they fit into
memory, and else computed again in the backward pass, of the language model first; MFU never counts what is recomputed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForImageTextToText

from benchmarks.gpu_models import MODELS, TINY, make_batch, make_samples
from benchmarks.report import report
from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.model.attention.kernels import why_not
from qvl_pipeline.engine.model.attention.packed import use_packed_attention
from qvl_pipeline.engine.model.compilation import compile_blocks
from qvl_pipeline.engine.model.flops import flops_of, peak_flops
from qvl_pipeline.engine.model.kernels import use_liger_kernels
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.model.sharded import shard_model
from qvl_pipeline.engine.optim.optimization import make_optimizers
from qvl_pipeline.engine.parallel.sharding import start_process_group
from qvl_pipeline.engine.spec import AdapterSpec, OptimSpec, ParallelSpec, RecomputeSpec
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.pixels import normalize_patches

ATTENTION = ("flash_attention_3", "flash_attention_2", "torch_varlen", "sdpa")
BLOCKS = ("eager", "liger", "compiled")
# Attention of the comparator, and whether it has our patch embedding.
PADDED = (("sdpa", True), ("sdpa", False), ("flash_attention_2", True))
WARMUP_STEPS = 2
# What to try until a step fits into memory: of ours, whose activations to recompute, and whether the weights are cast
# to bfloat16 once more for the backward pass (`reshard_after_forward`); of the comparator, which has one switch for
# all, how many rows to do at once as well.
RECOMPUTED: tuple[tuple[dict[str, str], bool], ...] = (
    ({}, False),
    ({}, True),
    ({"llm": "selective"}, False),
    ({"llm": "full"}, False),
    ({"llm": "full", "vit": "full"}, False),
    ({"llm": "full", "vit": "full"}, True),
)
ROWS_AT_ONCE = ((8, False), (4, False), (2, False), (1, False), (8, True), (2, True), (1, True))
MEAN_AND_STD = [0.5] * 3
# Whatever a kernel or model raises that is not there or does not run here.
_CANNOT = (ValueError, ImportError, RuntimeError, TypeError)
OPTIM = OptimSpec(
    optim="adamw_torch_fused",
    learning_rate=1e-5,
    learning_rates={},
    weight_decay=0.0,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    lr_scheduler_type="constant",
    lr_scheduler_kwargs={},
    warmup_steps=0,
    ema_decay=0.0,
    router_aux_loss_coef=None,
)
PARALLEL = ParallelSpec(
    transformer_layer_cls_to_wrap=(),
    reshard_after_forward=False,
    hsdp_shard_size=0,
    forward_prefetch=0,
    backward_prefetch=0,
    accumulate_sharded=False,
    cpu_offload=False,
    frozen_sharding="sharded",
    bf16=True,
    fp16=False,
    sp_ulysses_degree=1,
)
NO_ADAPTER = AdapterSpec(
    type="none",
    r=8,
    alpha=16.0,
    rslora=False,
    dropout=0.0,
    init="zeros_b",
    targets={"llm": "all"},
    train_fully=(),
    start_from="",
    quantize_base="none",
    double_quant=True,
    quantize_parts=("llm",),
    export="both",
)
NOTHING_RECOMPUTED = RecomputeSpec(llm="none", vit="none", every=1, offload=False)


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--tiny", action="store_true", help="small models, on any device")
    options = parser.parse_args()
    configs = TINY if options.tiny else {name: MODELS[name] for name in options.models}
    tokens, steps = (256, 1) if options.tiny else (options.tokens, options.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, config in configs.items():
        if name != "qwen2_5_vl_7b":  # the 3B has the same kernels
            report(f"gpu_numerics_{name}", numerics(shallow(config), device), ratios={}, targets={})
    with one_rank():
        for name, config in configs.items():
            rows: list[dict[str, Any]] = []
            for row in compare(config, device, tokens, steps):
                rows.append(row)
                report(f"gpu_{name}", rows, ratios=ratios(rows), targets={"best_mfu": ">= 0.40"})


def shallow(config: Any) -> Any:
    """The same model with few layers: what rounding does there needs no more, and float32 gradients fit twice."""
    config = copy.deepcopy(config)
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, vision.depth = min(text.num_hidden_layers, 4), min(vision.depth, 4)
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types and text.layer_types[: text.num_hidden_layers]
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if hasattr(vision, name):
            setattr(vision, name, [vision.depth - 1])
    return config


def compare(config: Any, device: torch.device, tokens: int, steps: int) -> Iterator[dict[str, Any]]:
    """Measure a model under every kernel that runs here, and as transformers runs it: a row for each, best first."""
    bench = _Bench(config, device, tokens, steps)
    cuda = device.type == "cuda"
    runs = [name for name in ATTENTION if why_not(name, device, half=True) is None]
    for blocks in BLOCKS if cuda else BLOCKS[:1]:
        yield {"stack": "ours", **bench.ours(runs[0], blocks)}
    for attention, linear in PADDED:
        yield {"stack": "transformers, linear patches" if linear else "transformers", **bench.padded(attention, linear)}
    for attention in (name for name in ATTENTION if name != runs[0]):
        yield {"stack": "ours", **bench.ours(attention, "liger" if cuda else "eager")}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compare the fastest of each stack, as far as they ran."""

    def best(of: str, key: str = "tokens_per_second") -> float:
        return max((row[key] for row in rows if row["stack"].startswith(of) and row[key]), default=0.0)

    plain = max((row["tokens_per_second"] or 0.0 for row in rows if row["stack"] == "transformers"), default=0.0)
    others = {"ours_over_transformers": plain, "ours_over_transformers_at_its_best": best("transformers")}
    return {name: best("ours") / other for name, other in others.items() if other} | (
        {"best_mfu": mfu} if (mfu := best("ours", "mfu")) else {}
    )


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """The engine's process group, of this process alone."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    before = {key: os.environ.get(key) for key in alone}
    os.environ.update(alone)
    start_process_group(1, timeout_s=600)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.update({key: value for key, value in before.items() if value is not None})
        for key in [key for key, value in before.items() if value is None]:
            del os.environ[key]


def _named(towers: dict[str, str], reshard: bool) -> str:
    named = [tower if kind == "full" else f"{tower} ({kind})" for tower, kind in towers.items()]
    return ", ".join([*named, *(["weights"] if reshard else [])]) or "nothing"


class _Bench:
    """One model on one device: the same samples for everyone."""

    def __init__(self, config: Any, device: torch.device, tokens: int, steps: int) -> None:
        self._config, self._device, self._steps = config, device, steps
        self._samples = make_samples(config, tokens)
        self._pack = make_batch(config, self._samples)
        skeleton = build(config, torch.device("meta"), torch.float32, "sdpa", False)
        self._flops = flops_of(skeleton).count(self._pack)

    def ours(self, attention: str, blocks: str) -> dict[str, Any]:
        """Time steps of the engine's model on a pack, with its blocks as they are, with Liger's kernels or compiled."""

        def make_step(recomputed: dict[str, str], reshard: bool) -> Callable[[], None]:
            model = build(self._config, self._device, torch.float32, attention, blocks == "liger", half=True)
            recompute_activations(model.hf, dataclasses.replace(NOTHING_RECOMPUTED, **recomputed))
            if blocks == "compiled":
                compile_blocks(model.hf, model.family, backend="inductor", mode="default")
            shard_model(model, self._device, dataclasses.replace(PARALLEL, reshard_after_forward=reshard))
            (optimizer,) = make_optimizers(model, OPTIM)
            targets = len(self._pack.targets)
            return lambda: _step(model, optimizer, [lambda: model(self._pack.to(self._device)).sum() / targets])

        ladder = {_named(towers, reshard): partial(make_step, towers, reshard) for towers, reshard in RECOMPUTED}
        return {"attention": attention, "blocks": blocks} | self._measure(ladder)

    def padded(self, attention: str, linear: bool) -> dict[str, Any]:
        """Time steps of transformers' model on padded rows."""

        def make_step(rows: int, recompute: bool) -> Callable[[], None]:
            torch.manual_seed(0)
            with self._device:
                hf = AutoModelForImageTextToText.from_config(
                    copy.deepcopy(self._config), dtype=torch.float32, attn_implementation=attention
                ).train()
            if linear:
                use_linear_patch_embedding(hf)
            if recompute:
                hf.gradient_checkpointing_enable()
            optimizer = torch.optim.AdamW(hf.parameters(), lr=OPTIM.learning_rate, weight_decay=0.0, fused=True)
            parts = [self._samples[start : start + rows] for start in range(0, len(self._samples), rows)]
            inputs = [padded_inputs(make_batch(self._config, part, rmpad=False)) for part in parts]
            items = torch.tensor(len(self._pack.targets), device=self._device)

            def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
                with torch.autocast(self._device.type, torch.bfloat16):
                    return hf(**{k: v.to(self._device) for k, v in batch.items()}, num_items_in_batch=items).loss

            return lambda: _step(hf, optimizer, [lambda batch=batch: loss(batch) for batch in inputs])

        ladder = {
            f"{'all' if recompute else 'nothing'}, {rows} rows at once": partial(make_step, rows, recompute)
            for rows, recompute in ROWS_AT_ONCE
        }
        return {"attention": attention, "blocks": "eager"} | self._measure(ladder)

    def _measure(self, ladder: Mapping[str, Callable[[], Callable[[], None]]]) -> dict[str, Any]:
        """Time a step of the first way, of those named in `ladder`, that fits into memory."""
        row: dict[str, Any] = dict.fromkeys(("tokens_per_second", "mfu", "step_s", "memory_gib", "recomputed"))
        note = ""
        for name, make_step in ladder.items():
            gc.collect()  # FSDP's hooks make cycles, which would keep the model before this one in memory
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                return row | self._time(make_step()) | {"recomputed": name, "note": ""}
            except torch.OutOfMemoryError as error:
                note = _first_line(error)
            except _CANNOT as error:
                note = _first_line(error)
                break
        return row | {"note": note}

    def _time(self, step: Callable[[], None]) -> dict[str, Any]:
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(WARMUP_STEPS + self._steps):
            started = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        seconds, peak = float(np.median(times[WARMUP_STEPS:])), peak_flops(self._device)
        return {
            "tokens_per_second": sum(self._pack.lengths) / seconds,
            "mfu": self._flops / seconds / peak if peak else None,
            "step_s": seconds,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        }


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, losses: Sequence[Callable[[], torch.Tensor]]) -> None:
    for loss in losses:
        loss().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def padded_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Turn padded rows into what the forward pass of transformers takes, as its processors return it."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.target_index + 1] = batch.targets
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "labels": labels}
    if batch.patches is not None:
        # Which tokens are images.
        inputs["mm_token_type_ids"] = torch.zeros_like(batch.input_ids, dtype=torch.int32)
        inputs["mm_token_type_ids"].view(-1)[batch.visual_index] = 1
        inputs["pixel_values"] = normalize_patches(batch.patches, MEAN_AND_STD, MEAN_AND_STD)
        inputs["image_grid_thw"] = batch.grid_thw
    return inputs


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:80]


def numerics(config: Any, device: torch.device) -> list[dict[str, Any]]:
    """Largest relative error of loss and gradients of each kernel, against eager attention in float32."""
    batch = make_batch(config, make_samples(config, 512)).to(device)
    expected = _loss_and_gradients(build(config, device, torch.float32, "eager", False), batch)
    rows = []
    for attention in ATTENTION:
        for dtype in (torch.float32, torch.bfloat16):
            for liger in (False, True) if device.type == "cuda" else (False,):
                row = {"attention": attention, "dtype": str(dtype).removeprefix("torch."), "liger": liger}
                try:
                    loss, gradients = _loss_and_gradients(build(config, device, dtype, attention, liger), batch)
                except _CANNOT as error:
                    rows.append(row | {"loss_error": None, "gradient_error": None, "note": _first_line(error)})
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
    return float(loss.detach()), [p.grad.float() for p in model.parameters()]


def build(
    config: Any, device: torch.device, dtype: torch.dtype, attention: str, liger: bool, *, half: bool = False
) -> PackedVLM:
    """Build a model for packs with random weights, the same whatever the kernels.

    Args:
        config: Config of the model.
        device: Where it is built, and runs.
        dtype: Of its weights.
        attention: Kernel of both towers.
        liger: Use Liger's kernels.
        half: It will compute in bfloat16 although its weights are float32.
    """
    torch.manual_seed(0)
    with device:
        hf = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
    hf.train()
    family = FAMILIES[config.model_type]
    use_linear_patch_embedding(hf)
    use_packed_attention(hf, attention, attention, device, half=half or dtype == torch.bfloat16)
    if liger:
        use_liger_kernels(hf, family, device)
    return PackedVLM(hf, family, MEAN_AND_STD, MEAN_AND_STD)


if __name__ == "__main__":
    main()

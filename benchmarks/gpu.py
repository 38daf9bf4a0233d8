"""Training speed, memory and numerics on one GPU: the engine under each attention kernel, and transformers' own model.

`python -m benchmarks.gpu [--models …] [--steps 5] [--tiny]`: random weights of Qwen-VL dimensions, so nothing is
downloaded; steps of 16,384 tokens with images. It needs what the engine needs and nothing more. `--tiny` is a small
model of each family on whatever device there is. What a device cannot run is a row that says why.

A step is whole: the batch to the device, forward, backward, clipping, fused AdamW. Weights, gradients and optimizer
state are float32 and the computation is bfloat16: in ours by FSDP2's policy, as the engine trains, in the comparator by
autocast, as transformers' Trainer does. The comparator is the model of transformers with its own forward pass and loss,
on padded rows of the same samples, with gradients accumulated over as many rows at a time as fit into memory. It is
measured as it comes, and with our patch embedding in place of its Conv3d.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForImageTextToText

from benchmarks.gpu_models import MODELS, TINY, make_batch, make_samples
from benchmarks.report import report
from qvl_pipeline.engine.attention import use_packed_attention
from qvl_pipeline.engine.batch import Batch
from qvl_pipeline.engine.families import FAMILIES
from qvl_pipeline.engine.flops import flops_of, peak_flops
from qvl_pipeline.engine.kernels import use_liger_kernels
from qvl_pipeline.engine.optimization import make_optimizers
from qvl_pipeline.engine.packed_vlm import PackedVLM
from qvl_pipeline.engine.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.recomputation import recompute_activations
from qvl_pipeline.engine.sharding import shard, start_process_group
from qvl_pipeline.engine.spec import OptimSpec, ParallelSpec
from qvl_pipeline.media.pixels import normalize_patches

ATTENTION = ("flash_attention_3", "flash_attention_2", "torch_varlen", "sdpa")
# Attention of the comparator, and whether it has our patch embedding.
PADDED = (("sdpa", False), ("sdpa", True), ("flash_attention_2", True))
WARMUP_STEPS = 2
ROWS_AT_ONCE = (32, 16, 8, 4, 2, 1)
MEAN_AND_STD = [0.5] * 3
# Whatever a kernel or model raises that is not there or does not run here.
_CANNOT = (ValueError, ImportError, RuntimeError)
_OPTIM = OptimSpec(
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
)
_PARALLEL = ParallelSpec(
    wrap=(),
    reshard_after_forward=False,
    hsdp_shard_size=0,
    forward_prefetch=0,
    backward_prefetch=0,
    cpu_offload=False,
    bf16=True,
    fp16=False,
    sp_ulysses_degree=1,
)


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, in both")
    parser.add_argument("--tiny", action="store_true", help="small models, on any device")
    options = parser.parse_args()
    configs = TINY if options.tiny else {name: MODELS[name] for name in options.models}
    tokens, steps = (256, 1) if options.tiny else (options.tokens, options.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    errors = [{"model": name, **row} for name, config in configs.items() for row in numerics(config, device)]
    report("gpu_numerics", errors, ratios={}, targets={})
    rows, ratios = compare(configs, tokens, steps, recompute=options.recompute)
    report("gpu", rows, ratios=ratios, targets={"best_mfu": ">= 0.40"})


def compare(
    configs: dict[str, Any], tokens: int, steps: int, *, recompute: bool = False
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure every model under every kernel that runs here, and as transformers runs it.

    Returns:
        One row for each combination, and the ratios.
    """
    rows = []
    with _one_rank() as device:
        for name, config in configs.items():
            bench = _Bench(config, device, tokens, steps, recompute)
            for attention in ATTENTION:
                for liger in (False, True) if device.type == "cuda" else (False,):
                    rows.append({"model": name, "stack": "ours", **bench.ours(attention, liger)})
            for attention, linear in PADDED:
                stack = "transformers, linear patches" if linear else "transformers"
                rows.append({"model": name, "stack": stack, **bench.padded(attention, linear)})
    ratios = {}
    for name in configs:
        mine = [row for row in rows if row["model"] == name and row["tokens_per_second"]]
        best = {
            key: max((row["tokens_per_second"] for row in mine if row["stack"].startswith(key)), default=0.0)
            for key in ("ours", "transformers")
        }
        plain = max((row["tokens_per_second"] for row in mine if row["stack"] == "transformers"), default=0.0)
        for key, other in (("transformers", plain), ("transformers_at_its_best", best["transformers"])):
            if other:
                ratios[f"{name}_ours_over_{key}"] = best["ours"] / other
    if mfus := [row["mfu"] for row in rows if row["stack"] == "ours" and row["mfu"]]:
        ratios["best_mfu"] = max(mfus)
    return rows, ratios


@contextlib.contextmanager
def _one_rank() -> Iterator[torch.device]:
    """The engine's process group, of this process alone."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    before = {key: os.environ.get(key) for key in alone}
    os.environ.update(alone)
    _, device = start_process_group(1, timeout_s=600)
    try:
        yield device
    finally:
        dist.destroy_process_group()
        os.environ.update({key: value for key, value in before.items() if value is not None})
        for key in [key for key, value in before.items() if value is None]:
            del os.environ[key]


class _Bench:
    """One model on one device: the same samples for everyone."""

    def __init__(self, config: Any, device: torch.device, tokens: int, steps: int, recompute: bool) -> None:
        self._config, self._device, self._steps, self._recompute = config, device, steps, recompute
        self._samples = make_samples(config, tokens)
        self._pack = make_batch(config, self._samples)
        skeleton = build(config, torch.device("meta"), torch.float32, "sdpa", False)
        self._flops = flops_of(skeleton).count(self._pack)

    def ours(self, attention: str, liger: bool) -> dict[str, Any]:
        """Time steps of the engine's model on a pack."""

        def make_step(_rows: int) -> Callable[[], None]:
            model = build(self._config, self._device, torch.float32, attention, liger, half=True)
            if self._recompute:
                recompute_activations(model.hf, ("llm", "vit"))
            shard(model, self._device, _PARALLEL)
            (optimizer,) = make_optimizers(model, _OPTIM)
            targets = len(self._pack.targets)
            return lambda: _step(model, optimizer, [lambda: model(self._pack.to(self._device)).sum() / targets])

        return {"attention": attention, "liger": liger} | self._measure(make_step, (len(self._samples),))

    def padded(self, attention: str, linear: bool) -> dict[str, Any]:
        """Time steps of transformers' model on padded rows."""

        def make_step(rows: int) -> Callable[[], None]:
            torch.manual_seed(0)
            with self._device:
                hf = AutoModelForImageTextToText.from_config(
                    copy.deepcopy(self._config), dtype=torch.float32, attn_implementation=attention
                ).train()
            if linear:
                use_linear_patch_embedding(hf)
            if self._recompute:
                hf.gradient_checkpointing_enable()
            optimizer = torch.optim.AdamW(hf.parameters(), lr=_OPTIM.learning_rate, weight_decay=0.0, fused=True)
            parts = [self._samples[start : start + rows] for start in range(0, len(self._samples), rows)]
            inputs = [padded_inputs(make_batch(self._config, part, rmpad=False)) for part in parts]
            items = torch.tensor(len(self._pack.targets), device=self._device)

            def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
                with torch.autocast(self._device.type, torch.bfloat16):
                    return hf(**{k: v.to(self._device) for k, v in batch.items()}, num_items_in_batch=items).loss

            return lambda: _step(hf, optimizer, [lambda batch=batch: loss(batch) for batch in inputs])

        return {"attention": attention, "liger": False} | self._measure(make_step, ROWS_AT_ONCE)

    def _measure(self, make_step: Callable[[int], Callable[[], None]], rows_at_once: Sequence[int]) -> dict[str, Any]:
        """Time the step that `make_step` makes for the most samples at once that fit into memory."""
        row: dict[str, Any] = dict.fromkeys(("rows_at_once", "tokens_per_second", "mfu", "step_s", "memory_gib"))
        note = ""
        for rows in rows_at_once:
            gc.collect()  # FSDP's hooks make cycles, which would keep the model before this one in memory
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                return row | {"rows_at_once": rows} | self._time(make_step(rows)) | {"note": ""}
            except torch.OutOfMemoryError as error:
                note = _first_line(error)
            except _CANNOT as error:
                return row | {"note": _first_line(error)}
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
    torch.nn.utils.clip_grad_norm_(model.parameters(), _OPTIM.max_grad_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def padded_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Turn padded rows into what the forward pass of transformers takes, as its processors return it."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.target_index + 1] = batch.targets
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "labels": labels}
    if batch.patches is not None:
        # Which tokens are images.
        inputs["mm_token_type_ids"] = batch.visual_mask.int()
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
    return float(loss.detach()), [p.grad.float().cpu() for p in model.parameters()]


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

"""The speed table: every published model, trained in every form on images and on video, on the GPUs that are there.

`python -m benchmarks.gpu_table [--minutes 14] [--models …] [--forms …] [--steps 5] [--tiny]`, on one GPU; on several,
`torchrun --nproc-per-node 8 -m benchmarks.gpu_table`, and on a cluster
`srun --nodes=2 --gpus-per-node=8 --ntasks-per-node=1 torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d
--rdzv-endpoint=$HOST:29500 -m benchmarks.gpu_table`. Each rank has a pack of its own, and figures are of one rank.

A row is in `results/gpu_table_<ranks>.json` and `.csv` as soon as it is measured, the most important first; a call that
is cut off goes on with the next one, on the same hardware and versions. Weights are random, of the published sizes
(`families/facts`), so nothing is downloaded. A step is whole: the batch to the device, forward, backward, clipping,
fused AdamW; weights that are trained are float32, frozen ones bfloat16, the computation bfloat16. Packs are of
16,384 tokens: of samples of which two in three have a picture, or one clip of up to 512 frames at one a second.

`mfu` counts what the model needs, vision tower included, `mfu_language_model` the language model alone, which is what
others publish; neither counts what is computed twice. What does not fit into memory is tried with less kept there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import gc
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks import report as reports
from benchmarks.gpu import MEAN_AND_STD, NO_ADAPTER, NOTHING_RECOMPUTED, OPTIM, PARALLEL, RECOMPUTED, one_rank
from benchmarks.gpu_models import IDS, TINY, TINY_LAYERS, make_batch, make_clip, make_samples
from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.model.adapters.adapted import adapted_layers
from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.model.adapters.injection import inject, quantize_base
from qvl_pipeline.engine.model.adapters.values import fill_quantized
from qvl_pipeline.engine.model.attention.linear import use_packed_linear_attention
from qvl_pipeline.engine.model.attention.packed import use_packed_attention
from qvl_pipeline.engine.model.flops import ModelFlops, flops_of, peak_flops
from qvl_pipeline.engine.model.freezing import freeze, hold_parameters
from qvl_pipeline.engine.model.kernels import use_liger_kernels
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.model.routing import use_experts_kernel
from qvl_pipeline.engine.model.sharded import shard_model
from qvl_pipeline.engine.model.weights import compute_buffers
from qvl_pipeline.engine.optim.optimization import make_optimizers
from qvl_pipeline.engine.parallel.sharding import start_process_group
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.facts import MODELS

FORMS = ("full", "frozen vision", "lora", "qlora")
MEDIA = ("images", "video")
# Of these only so many decoder layers: the whole would not fit one GPU.
CUT = {"Qwen/Qwen3-VL-30B-A3B-Instruct": 8}
PUBLISHED = (
    *(f"Qwen/{name}-Instruct" for name in ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-4B", "Qwen3-VL-8B")),
    *("Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B", *CUT),
)
SMALL = TINY | TINY_LAYERS
WARMUP_STEPS = 2
_LORA = dataclasses.replace(NO_ADAPTER, type="lora", r=64, alpha=128.0, export="adapter")
_ADAPTERS = {"lora": _LORA, "qlora": dataclasses.replace(_LORA, quantize_base="nf4")}
_MEASURED = ("tokens_per_second", "mfu", "mfu_language_model", "step_s", "memory_gib", "watts", "kept_less")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows that are missing, in the order of their importance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--minutes", type=float, default=14.0, help="no row is begun that may not end within them")
    parser.add_argument("--tiny", action="store_true", help="small models, on any device")
    options = parser.parse_args(arguments)
    models = tuple(SMALL) if options.tiny else tuple(options.models)
    tokens, steps = (512, 1) if options.tiny else (options.tokens, options.steps)
    began, longest = time.monotonic(), 0.0
    with _ranks() as device:
        table = _Table(f"gpu_table_{'tiny' if options.tiny else dist.get_world_size()}")
        for model, form, media in by_importance(models, tuple(options.forms)):
            row = {"model": model, "form": form, "media": media, "tokens": tokens, "ranks": dist.get_world_size()}
            if table.has(row):
                continue
            if time.monotonic() - began + longest > 60 * options.minutes:
                break
            started = time.monotonic()
            table.add(row | measure(_config(model), form, media, device, tokens, steps))
            longest = max(longest, time.monotonic() - started)


def by_importance(models: Sequence[str], forms: Sequence[str] = FORMS) -> list[tuple[str, str, str]]:
    """All rows: every model in full on images, then the first form of video, then what takes turns after them.

    What its family says no to is no row of a model.
    """
    rows = [(model, form, media) for form in forms for media in MEDIA for model in models if trains(model, form)]
    return sorted(rows, key=lambda row: forms.index(row[1]) + MEDIA.index(row[2]))  # stable: models keep their order


def trains(model: str, form: str) -> bool:
    """Whether a model can be trained in a form."""
    family = FAMILIES[SMALL[model].model_type if model in SMALL else MODELS[model].family]
    return form not in _ADAPTERS or not _ADAPTERS[form].quantizes or "quantized_base" not in family.unsupported


class _Table:
    """The rows measured so far, on disk after each; those of other hardware or versions do not count."""

    def __init__(self, name: str) -> None:
        self._path = reports.RESULTS / f"{name}.json"
        self._machine = reports.machine()
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.rows: list[dict[str, Any]] = kept.get("rows", []) if kept.get("machine") == self._machine else []

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a row of this model, form, medium and size is there."""
        return any(row.items() <= {key: found.get(key) for key in row}.items() for found in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row down; called by all ranks, of which the first writes."""
        self.rows.append(row)
        if dist.get_rank():
            return
        reports.print_table([row])
        self._path.parent.mkdir(exist_ok=True)
        result = {"rows": self.rows, "machine": self._machine}
        part = self._path.with_suffix(".partial")
        part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        part.replace(self._path)
        with self._path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)


def measure(config: Any, form: str, media: str, device: torch.device, tokens: int, steps: int) -> dict[str, Any]:
    """Time steps of a model in a form of training, with as much kept in memory as fits.

    Returns:
        The figures of a row, or none of them and a `note` that says why.
    """
    samples = make_samples(config, tokens) if media == "images" else [make_clip(config, tokens)]
    batch, row, note = make_batch(config, samples), dict.fromkeys(_MEASURED), ""
    fixed = {"warmup_steps": WARMUP_STEPS, "measured_steps": steps}
    for recomputed, reshard in RECOMPUTED:
        gc.collect()  # FSDP's hooks make cycles, which would keep the model before this one in memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model, flops, kernels = _build(config, form, device, recomputed, reshard)
            found = _time(model, flops, batch, device, steps)
        except torch.OutOfMemoryError as error:
            note = str(error).splitlines()[0][:80]
            continue
        except (ValueError, ImportError, RuntimeError, TypeError) as error:  # what does not run here
            note = str(error).splitlines()[0][:80]
            break
        kept_less = [f"activations of {part} ({kind})" for part, kind in recomputed.items()]
        less = ", ".join([*kept_less, *(["weights"] if reshard else [])])
        return row | fixed | found | {"kept_less": less or "nothing", "kernels": kernels, "note": ""}
    return row | fixed | {"kernels": "", "note": note}


def _build(
    config: Any, form: str, device: torch.device, recomputed: Mapping[str, str], reshard: bool
) -> tuple[PackedVLM, ModelFlops, str]:
    """Build a model as the engine does, of random weights; say what its FLOPs are, and its kernels."""
    family, cuda = FAMILIES[config.model_type], device.type == "cuda"
    with torch.device("meta"):
        # A copy, in which the attention may be named: the next row begins with the config as it is.
        hf = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.float32)
    hf.train()
    use_linear_patch_embedding(hf)
    kernels = use_packed_attention(hf, "auto", "auto", device, half=True)
    if family.linear_attention:
        kernels["text"] += f", {use_packed_linear_attention(hf, family, 'auto', device, half=True)}"
    if family.experts:
        kernels["text"] += f", {use_experts_kernel(hf, 'auto', device)}"
    adapter = _ADAPTERS.get(form)
    if adapter:
        inject(hf, family, adapter)
    else:
        freeze(hf, family, ("visual",) if form == "frozen vision" else ())
    if cuda:
        use_liger_kernels(hf, family, device)
    hold_parameters(hf, trained=torch.float32, frozen=torch.bfloat16)
    if adapter and adapter.quantizes:
        quantize_base(hf, family, adapter)
    recompute_activations(hf, dataclasses.replace(NOTHING_RECOMPUTED, **recomputed))
    model = PackedVLM(hf, family, MEAN_AND_STD, MEAN_AND_STD)
    flops, normalization = flops_of(model), (model.image_mean, model.image_std)
    shard_model(model, device, dataclasses.replace(PARALLEL, reshard_after_forward=reshard))
    model.to_empty(device=device)
    model.image_mean, model.image_std = (values.to(device) for values in normalization)
    hf.tie_weights(recompute_mapping=False)
    compute_buffers(hf, device)
    _fill(model)
    return model, flops, kernels["text"] + (", liger" if cuda else "")


@torch.no_grad()
def _fill(model: PackedVLM) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        local = parameter.to_local()
        if local.is_floating_point():
            local.fill_(1.0) if local.ndim == 1 else local.normal_(std=0.02)
    for _, layer in quantized_layers(model.hf):
        fill_quantized(layer, 0.02 * torch.randn(layer.quantized.shape, device=layer.quantized.codes.device))
    for _, layer in adapted_layers(model.hf):
        layer.lora_B.to_local().zero_()


def _time(model: PackedVLM, flops: ModelFlops, batch: Batch, device: torch.device, steps: int) -> dict[str, Any]:
    (optimizer,) = make_optimizers(model, OPTIM)
    cuda, targets, seconds = device.type == "cuda", len(batch.targets), []
    watts: list[float] = []
    for number in range(WARMUP_STEPS + steps):
        started = time.perf_counter()
        (model(batch.to(device)).sum() / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            watts += _watts(device) if number >= WARMUP_STEPS else []  # while the device works
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step_s, peak = float(np.median(seconds[WARMUP_STEPS:])), peak_flops(device)
    none = (0,) * len(flops.per_vision_pair)
    no_vision = dataclasses.replace(flops, per_patch=0.0, per_vision_pair=none, per_vision_pass=0)
    shares = {"mfu": flops, "mfu_language_model": no_vision}
    return {
        "tokens_per_second": sum(batch.lengths) / step_s,
        **{name: counted.count(batch) / step_s / peak if peak else None for name, counted in shares.items()},
        "step_s": step_s,
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
        "watts": float(np.mean(watts)) if watts else None,
    }


def _watts(device: torch.device) -> list[float]:
    try:
        return [torch.cuda.power_draw(device) / 1000]
    except (ImportError, RuntimeError, OSError):  # nothing here can read it
        return []


def _config(model: str) -> Any:
    if model in SMALL:
        return SMALL[model]
    said = MODELS[model].config()
    said["text_config"]["num_hidden_layers"] = CUT.get(model, MODELS[model].text.num_hidden_layers)
    return AutoConfig.for_model(**said, **IDS)


@contextlib.contextmanager
def _ranks() -> Iterator[torch.device]:
    """Join torchrun's ranks, or be the only one."""
    alone = "WORLD_SIZE" not in os.environ
    with one_rank() if alone else contextlib.nullcontext():
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if not alone:
            _, device = start_process_group(1, timeout_s=600)
        yield device
        if not alone:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

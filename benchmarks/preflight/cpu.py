"""What a step really allocates on a CPU, by torch's profiler, and what the preflight says."""

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForImageTextToText

from benchmarks.gpu_models import RandomPatches, RandomSounds, make_heard_samples, make_samples
from benchmarks.preflight.settings import CONFIGS, Setting
from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.model.adapters.injection import inject
from qvl_pipeline.engine.model.attention.packed import use_packed_attention
from qvl_pipeline.engine.model.freezing import freeze, hold_parameters
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.model.sharded import shard_model
from qvl_pipeline.engine.optim.optimization import make_optimizers
from qvl_pipeline.engine.parallel.sequence_parallel import SequenceShare
from qvl_pipeline.engine.parallel.sharding import compute_dtype, sequence_group, start_process_group
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.ports import free_port
from qvl_pipeline.preflight.estimate import estimate
from qvl_pipeline.preflight.hardware import Hardware
from qvl_pipeline.preflight.packs import Heavy
from qvl_pipeline.tokens.encoding import placeholder_ids

_MARK = 7_654_321  # bytes of a tensor by which the start of the measured step is found among the allocations


def expected(setting: Setting) -> int:
    """Bytes of tensors that the preflight says a rank needs."""
    heavy = Heavy("", samples_of(setting))
    hardware = Hardware("cpu", 1, setting.ranks, 1 << 34, None)
    packs = setting.micro_batches * setting.ranks // setting.degree
    return estimate(setting.spec(), CONFIGS[setting.family], [heavy], hardware, packs).peak.bytes


def samples_of(setting: Setting) -> list[dict[str, Any]]:
    """Samples that fill a pack of a setting: with sounds, where the model hears."""
    make = make_heard_samples if FAMILIES[setting.family].hearing else make_samples
    return make(CONFIGS[setting.family], setting.tokens)


def measured(settings: Sequence[Setting]) -> list[int]:
    """Most bytes that any rank had allocated in its second step; all settings have the same number of ranks."""
    with TemporaryDirectory() as folder:
        ranks, port = settings[0].ranks, free_port()
        mp.start_processes(_rank, (ranks, port, list(settings), folder), nprocs=ranks, start_method="spawn")
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        return [max(values) for values in zip(*found, strict=True)]


def _rank(rank: int, ranks: int, port: int, settings: list[Setting], folder: str) -> None:
    alone = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})
    torch.set_num_threads(1)
    peaks = []
    for number, setting in enumerate(settings):
        os.environ["MASTER_PORT"] = str(port + number)
        mesh, device = start_process_group(setting.degree, timeout_s=600)
        peaks.append(_peak(setting, mesh, device))
        dist.destroy_process_group()
        gc.collect()
    Path(folder, f"{rank}.json").write_text(json.dumps(peaks))


def _peak(setting: Setting, mesh: Any, device: torch.device) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        _train(setting, mesh, device)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    counts = False
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.nbytes() == _MARK:
            counts = True
            continue
        now += event.nbytes() if event.nbytes() != -_MARK else 0
        highest = max(highest, now) if counts else 0
    return highest


def _train(setting: Setting, mesh: Any, device: torch.device) -> None:
    spec, config, group = setting.spec(), CONFIGS[setting.family], sequence_group(mesh)
    model = _model(setting, device, group)
    shard_model(model, device, spec.parallel)
    optimizers = make_optimizers(model, spec.optim)
    pack = _pack(config, setting, SequenceShare(mesh["sp"].get_local_rank(), mesh["sp"].size()))
    for step in range(2):
        if step == 1:
            mark = torch.empty(_MARK, dtype=torch.uint8)
            del mark
        for micro_batch in range(1, setting.micro_batches + 1):
            batch = pack.map_tensors(torch.clone)
            is_last = micro_batch == setting.micro_batches
            model.set_requires_gradient_sync(is_last or spec.parallel.accumulate_sharded)
            losses = model(batch)
            (losses.sum() / 1000).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _model(setting: Setting, device: torch.device, group: Any) -> PackedVLM:
    spec, family = setting.spec(), FAMILIES[setting.family]
    hf = AutoModelForImageTextToText.from_config(copy.deepcopy(CONFIGS[setting.family]), dtype=torch.float32)
    hf.train()
    use_linear_patch_embedding(hf)
    use_packed_attention(hf, "sdpa", "sdpa", device, half=setting.bf16, sp_group=group)
    freeze(hf, family, setting.freeze)
    if spec.adapter.used:
        inject(hf, family, spec.adapter)
    trained = torch.bfloat16 if spec.optim.in_bfloat16 else torch.float32
    hold_parameters(hf, trained=trained, frozen=compute_dtype(spec.parallel))
    recompute_activations(hf, spec.recompute)
    return PackedVLM(hf, family, [0.5] * 3, [0.5] * 3, group)


def _pack(config: Any, setting: Setting, share: SequenceShare) -> Batch:
    values = 3 * 2 * config.vision_config.patch_size**2
    family = FAMILIES[setting.family]
    speed = family.tokens_per_second(config)
    builder = BatchBuilder(
        RandomPatches(values),
        values,
        placeholder_ids(config),
        speed,
        partial(family.vision_inputs, config.vision_config),
        ("benchmark",),
        sounds=RandomSounds(None, family.hearing, config) if family.hearing else None,
        share=share,
    )
    return builder.build(samples_of(setting), vision=True)

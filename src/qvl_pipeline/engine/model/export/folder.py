"""The trained model as a plain transformers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import ProcessorMixin
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qvl_pipeline.engine.model.adapters import FOLDER
from qvl_pipeline.engine.model.adapters.export import export_adapter
from qvl_pipeline.engine.model.export.base_files import OF_WEIGHTS, find_base_files, with_dtype
from qvl_pipeline.engine.model.export.processor_files import PROCESSOR_FILES, processor_files
from qvl_pipeline.engine.model.export.whole_weights import WholeWeights
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.storage.digests import write_digests
from qvl_pipeline.storage.room import room_for


def export(model: PackedVLM, files: Mapping[str, bytes], spec: TrainSpec, target: Path | None = None) -> None:
    """Write the base model's folder with other weights, or a folder with an adapter; called by all ranks.

    The folder appears whole, by one rename. Weights are gathered tensor by tensor and written file by file: no device
    holds more than one of them whole, and rank 0 no more than one file of them.

    Args:
        model: The trained model.
        files: Content of all other files, by name; the first rank's count.
        spec: The run.
        target: The folder, where it is not that of the spec.

    Raises:
        NoRoomError: The disk is full.
    """
    target = target or Path(spec.export.output_dir)
    partial = target.with_name(f".{target.name}.partial")
    leads, dtype = dist.get_rank() == 0, getattr(torch, spec.export.dtype)
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    whole = not spec.adapter.used or spec.adapter.export != "adapter"
    weights = WholeWeights(model, spec.model.path, leads=leads) if whole else None
    needed = sum(weights.sizes(dtype).values()) if weights else None
    with room_for(target, needed, partial):
        if spec.adapter.used and spec.adapter.export != "merged":
            export_adapter(model, spec, partial / FOLDER if leads else None)
        if weights:
            _write_weights(model, weights, partial if leads else None, dtype, spec.export.max_shard_bytes)
        if not leads:
            return
        for name, content in files.items():
            if whole or name not in OF_WEIGHTS:
                (partial / name).write_bytes(content)
        write_digests(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def exported_files(processor: ProcessorMixin, spec: TrainSpec) -> dict[str, bytes]:
    """Make all that an export holds but weights, from the base model's files.

    Only what training decided is not as it was: the type of the weights in `config.json`, and how the processor samples
    and resizes.

    Args:
        processor: The base model's processor.
        spec: The run.

    Returns:
        Content of each file, by name.

    Raises:
        ValueError: The base model has no configuration of an image processor.
    """
    paths = find_base_files(spec.model.path, spec.model.processor)
    files = {name: path.read_bytes() for name, path in paths.items()}
    files[CONFIG_NAME] = with_dtype(files[CONFIG_NAME], getattr(torch, spec.export.dtype))
    of_processor = {name: files[name] for name in PROCESSOR_FILES if name in files}
    return files | processor_files(of_processor, processor, spec.model, spec.sampling)


def _write_weights(
    model: PackedVLM, weights: WholeWeights, folder: Path | None, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Gather all weights and write them to `folder`; the ranks that give `None` only take part."""
    sizes = weights.sizes(dtype)
    files = split_into_files(sizes, max_shard_bytes)
    for file, names in files.items():
        tensors = {}
        for name in names:
            tensor = weights.read(name, dtype)
            if tensor is not None:
                tensors[weights.name_in_base(name)] = tensor.contiguous()
        if folder:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if folder and len(files) > 1:
        weight_map = {weights.name_in_base(name): file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split_into_files(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Share tensors out over files, in order, as transformers names them.

    Args:
        sizes: Bytes of each tensor.
        max_shard_bytes: Most bytes of a file; only a single tensor may exceed it.

    Returns:
        Names of the tensors in each file.
    """
    shards: list[list[str]] = []
    filled = max_shard_bytes + 1
    for name, size in sizes.items():
        if filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SAFE_WEIGHTS_NAME: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": names for n, names in enumerate(shards, start=1)}

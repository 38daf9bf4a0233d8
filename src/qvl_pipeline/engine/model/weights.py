"""Weights from a Hugging Face folder into a sharded model: each rank reads and holds its own part, none the whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from qvl_pipeline.engine.model.adapters.adapted import base_sizes
from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.model.adapters.values import fill_quantized
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.weight_files import StoredWeights, weights_folder

# A checkpoint names a handful of these before the message stops being readable.
_NAMES_SHOWN = 3


def build_skeleton(path: str) -> PreTrainedModel:
    """Build a model on the meta device: all names and shapes, but no storage and no weights.

    Args:
        path: Folder or hub id; only its configuration is read.

    Raises:
        ValueError: The checkpoint is quantised.
    """
    config = read_config(path)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"'{path}' is a quantised checkpoint, which cannot be trained: use the unquantised model")
    return skeleton_of(config)


def read_config(path: str) -> PreTrainedConfig:
    """Read the configuration of what is trained: of a model that also speaks, the part that reads, sees and hears.

    Args:
        path: Folder or hub id.
    """
    config = AutoConfig.from_pretrained(path)
    return getattr(config, "thinker_config", config)


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration on the meta device."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def load_weights(model: PackedVLM, path: str, device: torch.device, *, offload: bool) -> None:
    """Give a skeleton its storage and read the weights of a checkpoint into it; called by all ranks.

    Parameters may be sharded already: a rank then allocates its shards and reads only the rows of them. The stored
    type is converted to the parameters' own. What is to be quantised is read matrix by matrix, each whole, so that no
    number of ranks tells. What adapters add is left without values.

    Args:
        model: The model, on the meta device.
        path: Folder or hub id with safetensors files.
        device: Where the model runs.
        offload: Keep the parameters on the CPU.

    Raises:
        ValueError: The checkpoint lacks a parameter, or has one that the model does not know.
    """
    hf, family = model.hf, model.family
    normalization = model.image_mean, model.image_std
    model.to_empty(device="cpu" if offload else device)
    model.image_mean, model.image_std = (values.to(device) for values in normalization)
    # Giving storage to a parameter makes a new one, so what was one parameter under two names has become two.
    hf.tie_weights(recompute_mapping=False)
    compute_buffers(hf, device)
    names, tied = base_sizes(hf).keys(), hf.all_tied_weights_keys.keys()
    reader = HuggingFaceStorageReader(str(weights_folder(path)))
    found = {name: own for name, own in reader.read_metadata().state_dict_metadata.items() if not family.keeps(name)}
    stored = {family.module_name(name, names): name for name in found}
    _compare(path, [name for name in names if name not in tied], stored, tied)
    parameters = {name: tensor for name, tensor in hf.state_dict().items() if name in names - tied}
    published = {
        # Read into a view of the parameter, of which each rank holds the same experts.
        stored[name]: parameter.transpose(-1, -2)
        if family.is_transposed(name, found[stored[name]].size, parameter.shape)
        else parameter
        for name, parameter in parameters.items()
    }
    dcp.load(published, storage_reader=reader)
    weights = StoredWeights(path, family, names)
    for name, layer in quantized_layers(hf):
        fill_quantized(layer, weights.read(f"{name}.weight").to(device))


def compute_buffers(hf: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies), by transformers' own initialisation."""
    computed = {name for name, _ in hf.named_buffers()} - set(hf.state_dict())
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in computed):
        module = hf.get_submodule(owner)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.full_like(buffer, float("nan"), device=device))
        with torch.no_grad():
            hf._init_weights(module)
    for name in computed:
        if not torch.isfinite(hf.get_buffer(name)).all():
            raise ValueError(f"this version of transformers does not say how to compute the buffer '{name}'")


def _compare(path: str, parameters: Collection[str], stored: Mapping[str, str], tied: Collection[str]) -> None:
    missing = [name for name in parameters if name not in stored]
    unknown = [stored[name] for name in stored if name not in parameters and name not in tied]
    if missing or unknown:
        parts = [
            f"{text} {len(names)} parameters ({', '.join(names[:_NAMES_SHOWN])}{', …' * (len(names) > _NAMES_SHOWN)})"
            for text, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise ValueError(f"the checkpoint '{path}' {' and '.join(parts)}: it is not of this model, or not complete")

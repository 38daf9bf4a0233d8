"""What adapters start with: nothing, the principal part of their matrices, or an adapter on disk."""

from __future__ import annotations

import math
import zlib

import torch
import torch.distributed as dist
from torch import nn

from qvl_pipeline.engine.model.adapters.adapted import adapted_layers, adapter_parameters, base_sizes
from qvl_pipeline.engine.model.adapters.experts import ExpertsUpdate
from qvl_pipeline.engine.model.adapters.files import StoredAdapter, read_adapter
from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear, row_lengths_of
from qvl_pipeline.engine.model.adapters.values import fill, whole_matrix
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.weight_files import StoredWeights
from qvl_pipeline.engine.spec import AdapterSpec

_NAMES_SHOWN = 3


def set_initial_values(model: PackedVLM, spec: AdapterSpec, base: str, seed: int) -> None:
    """Give adapters the values they start with: the same on any number of ranks; called by all of them.

    Args:
        model: The model, with the weights of the base model.
        spec: The adapter.
        base: Folder or hub id of the base model.
        seed: Seed of the run.

    Raises:
        ValueError: The adapter to start from cannot be read.
    """
    if spec.start_from:
        _start_from(model, spec.start_from, base)
        return
    for name, layer in adapted_layers(model.hf):
        if layer.form.pissa:
            a, b = _principal_part(layer)
            for parameter, values in ((layer.lora_A, a), (layer.lora_B, b), (layer.lora_A0, a), (layer.lora_B0, b)):
                # As the computation sees both: at the first step nothing must be left of their difference.
                fill(parameter, values.to(layer.lora_A0.dtype))
            continue
        fill(layer.lora_A, _random_rows(layer, f"{seed}/{name}"))
        nn.init.zeros_(layer.lora_B)
        if layer.form.dora:
            nn.init.zeros_(layer.lora_magnitude)


def _random_rows(layer: AdaptedLinear | ExpertsUpdate, seed: str) -> torch.Tensor:
    """Draw `A` as peft does, but from a generator of the layer's own: it depends on nothing that was drawn before."""
    values = torch.empty(layer.lora_A.shape, dtype=torch.float32)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    nn.init.kaiming_uniform_(values.flatten(0, -2), a=math.sqrt(5), generator=generator)  # of all experts alike
    return values


def _principal_part(layer: AdaptedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the principal part of a matrix into `s B A` (Meng et al. 2024, PiSSA); the first rank's answer counts."""
    u, s, v = torch.linalg.svd(whole_matrix(layer), full_matrices=False)
    r = layer.form.r
    root = (s[:r] / layer.form.scaling).sqrt()
    a, b = (root[:, None] * v[:r]).contiguous(), (u[:, :r] * root).contiguous()
    if dist.is_initialized():
        # Devices of different kinds would not agree on the last bits, nor on signs.
        for tensor in (a, b):
            dist.broadcast(tensor, src=0)
    return a, b


def _start_from(model: PackedVLM, folder: str, base: str) -> None:
    stored, weights = read_adapter(folder), StoredWeights(base, model.family, base_sizes(model.hf))
    for name, layer in adapted_layers(model.hf):
        tensors = stored.layers[name]
        for own in ("lora_A", "lora_B"):
            fill(getattr(layer, own), tensors[own])
        if layer.form.dora:
            fill(layer.lora_magnitude, tensors["lora_magnitude"] - row_lengths_of(weights.read(f"{name}.weight")))
    for name, values in stored.fully.items():
        fill(model.hf.get_parameter(name), values)


def check_start(model: nn.Module, spec: AdapterSpec) -> None:
    """Refuse to start from an adapter that is not of the form that the parameters say.

    Args:
        model: The transformers model with adapted layers; a skeleton on the meta device will do.
        spec: The adapter.

    Raises:
        ValueError: Names the first difference.
    """
    if not spec.start_from:
        return
    stored = read_adapter(spec.start_from)
    for name in ("type", "r", "alpha", "rslora"):
        if (there := getattr(stored, name)) != (here := getattr(spec, name)):
            raise ValueError(
                f"adapter.start_from: {spec.start_from} has {name} {there}, but adapter.{name} is {here}: set it to "
                f"{there}"
            )
    _same(spec.start_from, "adapts", set(stored.layers), {name for name, _ in adapted_layers(model)}, "targets")
    added = adapter_parameters(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name not in added}
    # peft stores modules whole: a bias that is not trained may be beside a weight that is.
    beside = {name for name in stored.fully if name.rpartition(".")[0] in {t.rpartition(".")[0] for t in trained}}
    _same(spec.start_from, "trains in full", set(stored.fully) - (beside - trained), trained, "train_fully")
    _check_shapes(spec.start_from, stored, model)


def _same(folder: str, does: str, there: set[str], here: set[str], key: str) -> None:
    if there == here:
        return
    only = sorted(there - here) or sorted(here - there)
    where = "there only" if there - here else "here only"
    names = ", ".join(only[:_NAMES_SHOWN]) + ", …" * (len(only) > _NAMES_SHOWN)
    raise ValueError(
        f"adapter.start_from: what {folder} {does} is not what adapter.{key} names: {len(only)} {where} ({names})"
    )


def _check_shapes(folder: str, stored: StoredAdapter, model: nn.Module) -> None:
    for name, layer in adapted_layers(model):
        for own, tensor in stored.layers[name].items():
            if tensor.shape != (expected := getattr(layer, own).shape):
                raise ValueError(
                    f"adapter.start_from: {own} of {name} in {folder} is {list(tensor.shape)}, but this model needs "
                    f"{list(expected)}: it was made for another model, or saved from one of several ranks"
                )

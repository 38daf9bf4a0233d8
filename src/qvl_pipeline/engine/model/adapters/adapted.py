"""The adapted layers of a model, and which of its parameters are whose."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qvl_pipeline.engine.model.adapters.experts import ExpertsUpdate, target_of
from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear

# What an adapter adds to a layer is called so.
_ADDED = "lora_"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear | ExpertsUpdate]]:
    """Yield what is adapted in a model with its adapter, in its order: linear layers and fused tensors, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module
        if isinstance(module, ExpertsUpdate):
            yield target_of(name), module


def adapted_weights(model: nn.Module) -> dict[str, AdaptedLinear | ExpertsUpdate]:
    """Return the adapters of a model by the names of the parameters that they are added to."""
    return {weight_of(name, layer): layer for name, layer in adapted_layers(model)}


def weight_of(name: str, layer: nn.Module) -> str:
    """Name of the parameter that an adapter is added to, by that of what is adapted."""
    return name if isinstance(layer, ExpertsUpdate) else f"{name}.weight"


def adapter_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters that adapters add to a model."""
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[2].startswith(_ADDED)}


def base_sizes(model: nn.Module) -> dict[str, int]:
    """Return the elements of each weight of the base model by its name there: without adapters, as if unquantised."""
    quantized = {
        f"{name}.quantized.{own}": (f"{name}.weight", layer.quantized.shape.numel())
        for name, layer in quantized_layers(model)
        for own in layer.quantized.stored()
    }
    added = adapter_parameters(model)
    stored = ((name, tensor.numel()) for name, tensor in model.state_dict().items() if name not in added)
    return dict(quantized.get(name, (name, numbers)) for name, numbers in stored)

"""Values of sharded parameters: set from whole tensors, and gathered to whole tensors."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qvl_pipeline.engine.model.adapters.experts import ExpertsUpdate
from qvl_pipeline.engine.model.adapters.frozen import FrozenLinear
from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear
from qvl_pipeline.engine.model.adapters.nf4 import dequantize, quantize


@torch.no_grad()
def fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Set a parameter, or this rank's shard of it, from the whole tensor, which all ranks have."""
    if isinstance(parameter, DTensor):
        shape, start = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        whole = whole[tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))]
        parameter = parameter.to_local()
    parameter.copy_(whole)


def fill_quantized(layer: FrozenLinear, matrix: torch.Tensor) -> None:
    """Quantise a whole matrix, which all ranks have, and keep this rank's rows of its blocks.

    Raises:
        ValueError: It is not of the layer's shape.
    """
    quantized = layer.quantized
    if matrix.shape != quantized.shape:
        raise ValueError(f"a weight of shape {list(matrix.shape)} is stored, but the model has {list(quantized.shape)}")
    whole = quantize(matrix, double=quantized.double)
    for name, parameter in quantized.stored().items():
        fill(parameter, whole[name])


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole of a parameter on the CPU; called by all ranks."""
    return _whole(parameter).cpu()


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def whole_matrix(layer: FrozenLinear) -> torch.Tensor:
    """Return the whole matrix that a layer computes with, on its device: `[out, in]`, float32; called by all ranks."""
    if layer.quantized is None:
        return _whole(layer.weight).float()
    stored = {name: _whole(parameter) for name, parameter in layer.quantized.stored().items()}
    return dequantize(stored, layer.quantized.shape, torch.float32)


def gathered_adapter(layer: AdaptedLinear | ExpertsUpdate) -> dict[str, torch.Tensor]:
    """Return the whole tensors that an adapter adds to its layer, by their names there; called by all ranks."""
    added = [(name, p) for name, p in layer.named_parameters(recurse=False) if name.startswith("lora_")]
    return {name: gathered(parameter) for name, parameter in added}

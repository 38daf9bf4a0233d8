"""Values of sharded parameters: set from whole tensors, and gathered to whole tensors."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear


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


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole of a parameter on the CPU; called by all ranks."""
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()


def gathered_adapter(layer: AdaptedLinear) -> dict[str, torch.Tensor]:
    """Return the whole tensors that an adapter adds to its layer, by their names there; called by all ranks."""
    added = [(name, p) for name, p in layer.named_parameters(recurse=False) if name.startswith("lora_")]
    return {name: gathered(parameter) for name, parameter in added}

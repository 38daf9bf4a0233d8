"""Tensors on their way from a loader process, all in one.

Each tensor that a process sends to another is a file of shared memory of its own, and a connection by which its
descriptor is handed over: half a millisecond, much of it on the core that trains. A batch has fifteen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_ALIGNMENT = 64


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the one that has all."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.start : self.end].view(self.dtype).view(self.shape)


def mapped(values: Mapping[str, Any], function: Callable[[Any], Any], kind: type = torch.Tensor) -> dict[str, Any]:
    """Apply a function to the values of a kind, also to those in a dictionary among the values."""
    return {
        name: function(value)
        if isinstance(value, kind)
        else mapped(value, function, kind)
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }


def packed(values: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Lay tensors one behind the other.

    Args:
        values: Tensors in host memory among others, also in dictionaries.

    Returns:
        Uint8 `[bytes]`, and the values with the place of each tensor instead of it.
    """
    tensors: list[torch.Tensor] = []
    places: list[_Place] = []

    def place(tensor: torch.Tensor) -> _Place:
        start = math.ceil(places[-1].end / _ALIGNMENT) * _ALIGNMENT if places else 0
        tensors.append(tensor)
        places.append(_Place(start, tensor.dtype, tuple(tensor.shape)))
        return places[-1]

    placed = mapped(values, place)
    whole = torch.empty(places[-1].end if places else 0, dtype=torch.uint8)
    for tensor, where in zip(tensors, places, strict=True):
        where.of(whole).copy_(tensor)
    return whole, placed


def unpacked(whole: torch.Tensor, placed: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `packed`: the tensors are views of the one."""
    return mapped(placed, lambda place: place.of(whole), _Place)

"""Bytes that a computation on the meta device would hold, operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Allocators hand out multiples of this many bytes.
_MULTIPLE = {"cuda": 512, "cpu": 1}


class Ledger(TorchDispatchMode):
    """Counts the storages that operations on the meta device make, for as long as someone holds them.

    What a kernel allocates inside of an operation is not seen. Integers that are moved to the meta device (bounds,
    grids, positions) stay on the CPU instead, where their values can be read, and are not counted; an operation on
    tensors of both sees all of them on the meta device.

    Attributes:
        live: Bytes held now.
        peak: Most bytes held since `restart`.
    """

    def __init__(self, ignored: Iterable[torch.Tensor], device: str) -> None:
        """Start with nothing.

        Args:
            ignored: Tensors that are counted elsewhere, such as parameters.
            device: Type of the device that is stood in for, `cuda` or `cpu`.
        """
        super().__init__()
        self._multiple = _MULTIPLE[device]
        self._held: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in ignored}
        self.live = self.peak = 0

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it returns."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_meta = any(tensor.is_meta for tensor in tensors)
        if func is torch.ops.aten._to_copy.default and not on_meta and not tensors[0].is_floating_point():
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        if on_meta:
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self.add(leaf)
        return output

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self._multiple) * self._multiple
        if key in self._held:
            return

        def free(_: Any) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

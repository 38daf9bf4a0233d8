"""Counts where a host would wait for its GPU, on a CPU: reads of what was computed, and what is copied there late."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Their result, or its size, is known only when the device is done.
_READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.unique_consecutive,
}
_READS |= {aten._unique2, aten.unique_dim, aten.bincount, aten.masked_scatter_backward}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# Methods that read a tensor without a call to the dispatcher when it is in host memory.
_METHODS = {getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy", "__array__")}


class DeviceWaits(TorchDispatchMode):
    """Follows the tensors that would be on a GPU, and notes each operation for which the host would wait.

    On a device is what is given to `put`, and whatever is computed from it. Made on the host is what comes of Python
    numbers (`torch.tensor`): on its way to a GPU it is waited for, as it is not pinned.

    Attributes:
        found: The operation and the line of ours or of transformers, of each wait.
    """

    def __init__(self, *, ignored: Iterable[str] = ()) -> None:
        """Follow nothing yet; what functions of the names `ignored` do is not noted."""
        super().__init__()
        self.found: list[str] = []
        self._ignored = set(ignored)
        self._methods = _Methods(self)
        # Storages are kept, so that none is freed and its number given to another.
        self._on_device: dict[int, Any] = {}
        self._made_on_host: dict[int, Any] = {}

    def __enter__(self) -> DeviceWaits:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def put(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take tensors to be on the device."""
        for tensor in tensors:
            self._made_on_host.pop(_storage(tensor), None)
            self._keep(self._on_device, tensor)

    def take(self, tensor: torch.Tensor) -> None:
        """Take a tensor to be in host memory, whatever it was computed from."""
        self._on_device.pop(_storage(tensor), None)

    def note(self, operation: object) -> None:
        """Note a wait of the code that is running, unless it is ignored."""
        frames = traceback.extract_stack()
        if not self._is_ignored(frames):
            ours = [f for f in frames if "qvl_pipeline" in f.filename or "transformers" in f.filename]
            where = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "backward pass"
            self.found.append(f"{operation} in {where}")

    def _is_ignored(self, frames: traceback.StackSummary) -> bool:
        return not self._ignored.isdisjoint(frame.name for frame in frames)

    def holds(self, tensor: object) -> bool:
        """Say whether a tensor would be on the device."""
        return isinstance(tensor, torch.Tensor) and _storage(tensor) in self._on_device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        late = [tensor for tensor in given if tensor.ndim and _storage(tensor) in self._made_on_host]
        on_device = any(map(self.holds, given))
        if on_device and self._waits(function, args, kwargs or {}):
            self.note(function)
        if on_device and late:
            self.note(f"copy to the device for {function}")
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            if on_device:
                self._keep(self._on_device, tensor)
            elif late or (function is aten.lift_fresh.default and not self._is_ignored(traceback.extract_stack())):
                self._keep(self._made_on_host, tensor)
        return result

    def _waits(self, function: Any, args: Any, kwargs: Any) -> bool:
        operation = function.overloadpacket
        if operation in _INDEXED:
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if operation is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        return operation in _READS

    def _keep(self, storages: dict[int, Any], tensor: torch.Tensor) -> None:
        number = _storage(tensor)
        if number is not None:
            storages[number] = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


class _Methods(TorchFunctionMode):
    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _METHODS and self._waits.holds(args[0]):
            self._waits.note(function.__name__)
        return function(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int | None:
    """Number of the storage of a tensor, of a DTensor's own part; other wrappers have none."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return None
    return tensor.untyped_storage()._cdata

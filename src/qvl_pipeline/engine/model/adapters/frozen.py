"""A frozen linear layer: its matrix as it is, or quantised, and then made anew wherever it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qvl_pipeline.engine.model.adapters.nf4 import dequantize, stored_shapes


class QuantizedMatrix(nn.Module):
    """The bytes of a quantised matrix, as parameters that FSDP2 shards and gathers; `nf4.py` says what they are.

    Attributes:
        shape: Shape of the matrix.
        double: Scales of blocks are quantised too.
    """

    def __init__(self, matrix: torch.Tensor, *, double: bool) -> None:
        """Make room for a matrix, on its device; the bytes are still without values."""
        super().__init__()
        self.shape, self.double = matrix.shape, double
        shapes = stored_shapes(matrix.numel(), double=double)
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            values = torch.empty(shape, dtype=torch.uint8, device=matrix.device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the bytes, as the module has them now: those of a rank, or gathered."""
        return {name: getattr(self, name) for name in self._names}


class FrozenLinear(nn.Linear):
    """`y = W x + b`, of which neither is trained.

    Parameters keep their names, so that what loads, shards and exports a model need not know of it. Once quantised
    there is no `weight`, but `quantized`.
    """

    def __init__(self, base: nn.Linear) -> None:
        """Take over the parameters of a layer."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.quantized: QuantizedMatrix | None = None
        self.train(base.training)

    def quantize(self, *, double: bool) -> None:
        """Put a quantised matrix, still without values, in place of the weight."""
        self.quantized = QuantizedMatrix(self.weight, double=double)
        self.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `[…, in]` to `[…, out]`."""
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `W x`, and `b` added where it is given."""
        if self.quantized is None:
            return F.linear(x, self.weight, bias)
        stored = self.quantized.stored()
        return _QuantizedProduct.apply(x, bias, self.quantized.shape, tuple(stored), *stored.values())

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return `W`: the weight as it is held, or what the quantised one stands for, in a type."""
        quantized = self.quantized
        return self.weight if quantized is None else dequantize(quantized.stored(), quantized.shape, dtype)


class _QuantizedProduct(torch.autograd.Function):
    """`W x + b` that keeps the bytes of `W` for the backward pass and not `W`: of all layers it would be the model."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        shape: torch.Size,
        names: tuple[str, ...],
        *stored: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape, ctx.names = shape, names
        return F.linear(x, dequantize(dict(zip(names, stored, strict=True)), shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        stored = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        return gradient @ dequantize(stored, ctx.shape, gradient.dtype), *[None] * (3 + len(stored))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """Yield the layers of a model whose matrices are quantised, by name, in its order."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.quantized is not None:
            yield name, module

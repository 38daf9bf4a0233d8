"""Kernels of a GPU on the meta device: what they allocate and what they keep for the backward pass, and no values.

Sizes are those of the kernels' own code: FlashAttention 2 and 3 and torch's variable-length attention, which keep
query, key, value, output and the logarithms of the sums; Liger 0.8's RMS norm and SwiGLU, whose backward passes write
over what they read. What `torch.compile` makes of a block keeps as much as Liger's kernels do (within 0.1 % on a GPU).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qvl_pipeline.engine.model.attention.kernels import KERNELS, Segments, by_length
from qvl_pipeline.families import ModelFamily

# Operations of their own, under a name that selective recomputation knows as attention.
_LIBRARY = torch.library.Library("flash_attn_stand_in", "DEF")
_LIBRARY.define("forward(Tensor query) -> (Tensor, Tensor)")
_LIBRARY.define("work(Tensor query, bool grouped) -> Tensor[]")


@torch.library.impl(_LIBRARY, "forward", "Meta")
def _forward(query: Tensor) -> tuple[Tensor, Tensor]:
    """Output of query's shape `[…, D]`, and the logarithms of the sums `[…]`."""
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.impl(_LIBRARY, "work", "Meta")
def _work(query: Tensor, grouped: bool) -> list[Tensor]:
    """What the backward pass needs: query's gradient in float32; of grouped heads, two gradients of each query head."""
    summed = query.new_empty(query.shape, dtype=torch.float32)
    return [summed, *(query.new_empty(query.shape) for _ in range(2 * grouped))]


class _FlashAttention(torch.autograd.Function):
    """Query `[…, D]` to an output of its shape; key and value may have fewer heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, sums = torch.ops.flash_attn_stand_in.forward(query)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _output, _sums = ctx.saved_tensors
        work = torch.ops.flash_attn_stand_in.work(query, query.shape != key.shape)
        gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        del work
        return gradients


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        _x, weight, _ = ctx.saved_tensors
        return gradient, weight.new_empty(weight.shape) if ctx.needs_input_grad[1] else None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate.new_empty(gate.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.saved_tensors


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Attend like a kernel that knows packs: query `[1, H, T, D]` to output `[1, T, H, D]`."""
    return _FlashAttention.apply(*(x[0].transpose(0, 1) for x in (q, k, v)))[None]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, causal: bool) -> Tensor:
    """Attend like a kernel that takes rows of one length: query `[1, H, T, D]` to output `[1, T, H, D]`."""
    return by_length(q, k, v, segments, causal, _FlashAttention.apply)


STAND_INS = {"sdpa": sdpa_attention, "eager": KERNELS["eager"]} | dict.fromkeys(
    ("flash_attention_2", "flash_attention_3", "torch_varlen"), varlen_attention
)


def use_fused_blocks(model: nn.Module, family: ModelFamily) -> None:
    """Let the norms and gated MLPs of a model keep what Liger's kernels would."""

    def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight)

    def swiglu(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))

    forwards = {"rms_norm": rms_norm, "swiglu": swiglu}
    for module in model.modules():
        if kernel := family.liger_kernels.get(type(module).__name__):
            module.forward = MethodType(forwards[kernel], module)

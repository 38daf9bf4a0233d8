"""Attention over packs: the kernels there are, and which of them runs here.

Every kernel attends within the sequences of a pack, which lie end to end in one row.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_pipeline.engine.model.attention.equal_lengths import eighths, equal_lengths

Kernel = Callable[..., Tensor]

_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
# Compute capabilities: FlashAttention 2 (torch's varlen attention is made of it) from Ampere on, 3 on Hopper.
_AMPERE_ON, _HOPPER = range(80, 1000), range(90, 100)
_CAPABILITIES = {"flash_attention_2": _AMPERE_ON, "torch_varlen": _AMPERE_ON, "flash_attention_3": _HOPPER}


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a pack lie.

    Attributes:
        cu_seqlens: Bounds `[sequences + 1]`, int32.
        max_length: Tokens of the longest, if known without asking the device.
    """

    cu_seqlens: Tensor
    max_length: int | None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_length if self.max_length is not None else int(self.cu_seqlens.diff().max())


def choose_kernels(text: str, vision: str, device: torch.device, *, half: bool, rmpad: bool) -> tuple[str, str]:
    """Choose the kernels of the language model and the vision tower.

    Args:
        text: `attn_implementation`.
        vision: `vit_attn_implementation`.
        device: Where the model runs.
        half: It computes in bfloat16 or float16.
        rmpad: The language model sees packs; otherwise padded rows. The vision tower never sees padding.

    Returns:
        The name of the kernel of each.

    Raises:
        ValueError: A kernel is not installed, or does not run on this device, in this precision or on padded rows.
    """
    if not rmpad and text == "torch_varlen":
        raise ValueError("attn_implementation 'torch_varlen' knows no padding: use 'auto', or set use_rmpad to true")
    if not rmpad and text == "auto":
        text = "sdpa"
    # The language model's first: its parameter may be the only one that was set, and the vision tower's follows it.
    text = choose_kernel(text, device, half=half)
    return text, choose_kernel(vision, device, half=half, key="vit_attn_implementation")


def choose_kernel(name: str, device: torch.device, *, half: bool, key: str = "attn_implementation") -> str:
    """Choose the kernel of a tower.

    Args:
        name: `auto`, `flash_attention_2`, `flash_attention_3`, `torch_varlen`, `sdpa` or `eager`.
        device: Where the tower runs.
        half: It computes in bfloat16 or float16.
        key: The parameter to name in an error.

    Returns:
        The name of the kernel; for `auto` the fastest that runs.

    Raises:
        ValueError: The kernel is not installed, or does not run on this device or in this precision.
    """
    if name == "auto":
        order = ("flash_attention_3", "flash_attention_2", "torch_varlen", "sdpa")
        return next(kernel for kernel in order if why_not(kernel, device, half=half) is None)
    if reason := why_not(name, device, half=half):
        raise ValueError(f"{key} '{name}' {reason}: use 'auto'")
    return name


def why_not(name: str, device: torch.device, *, half: bool) -> str | None:
    """Say why a kernel cannot run on a device; `None` when it can."""
    if name not in _CAPABILITIES:
        return None
    if not installed(name):
        return f"needs the package {_PACKAGES[name]}, which is not installed"
    if device.type != "cuda":
        return f"runs on CUDA only, and this is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor not in _CAPABILITIES[name]:
        return f"does not run on {torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    if not half:
        return "computes in bfloat16 or float16 only, and neither bf16 nor fp16 is set"
    return None


def installed(name: str) -> bool:
    """Whether the package that a kernel is in is there, on whatever device."""
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None


def _flash(
    function: Kernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, causal: bool
) -> Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    bounds, longest = segments.cu_seqlens, segments.longest
    output = function(q, k, v, bounds, bounds, longest, longest, softmax_scale=scaling, causal=causal)
    return (output[0] if isinstance(output, tuple) else output)[None]


def _flash_attention_2(*arguments: Any) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, *arguments)


def _flash_attention_3(*arguments: Any) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, *arguments)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    bounds, longest = segments.cu_seqlens, segments.longest
    # A window of (-1, 0) is causal attention: every earlier key, no later one.
    window = (-1, 0) if causal else (-1, -1)
    options = {"scale": scaling, "window_size": window} | _grouped_heads(varlen_attn)
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)[None]


@cache
def _grouped_heads(varlen_attn: Kernel) -> dict[str, bool]:
    """Allow fewer key heads than query heads where that must be said; torch 2.11 does not ask, and takes them."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, causal: bool) -> Tensor:
    options = {"is_causal": causal, "scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    return by_length(q, k, v, segments, causal, partial(F.scaled_dot_product_attention, **options))


def _eager(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, causal: bool) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _repeat_heads(q, k, v)
        scores = (q @ k.transpose(2, 3)).float() * scaling
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    return by_length(q, k, v, segments, causal, attend)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads for kernels without grouped-query attention."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


@torch.compiler.disable(reason="the lengths of sequences are read on the host")
def by_length(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, attend: Kernel) -> Tensor:
    """Attend to all sequences of (nearly) one length as one batch: one kernel call a length, not one a sequence.

    Causal sequences are rounded up in length, because queries never see the keys behind them: what is read there does
    not matter, and its output is dropped. Others are batched only with sequences of exactly their length.
    """
    batches, order = equal_lengths(tuple(segments.cu_seqlens.tolist()), eighths if causal else None, q.device)
    if order is None:
        output = attend(*(x[0].unflatten(1, (-1, batches[0].length)).transpose(0, 1) for x in (q, k, v)))
        return output.permute(0, 2, 1, 3).flatten(0, 1)[None]
    outputs = []
    for batch in batches:
        rows = (x[0].index_select(1, batch.gather).unflatten(1, (-1, batch.length)).transpose(0, 1) for x in (q, k, v))
        outputs.append(attend(*rows).permute(0, 2, 1, 3).flatten(0, 1).index_select(0, batch.keep))
    return torch.cat(outputs).index_select(0, order)[None]


KERNELS: dict[str, Kernel] = {
    "flash_attention_2": _flash_attention_2,
    "flash_attention_3": _flash_attention_3,
    "torch_varlen": _torch_varlen,
    "sdpa": _sdpa,
    "eager": _eager,
}

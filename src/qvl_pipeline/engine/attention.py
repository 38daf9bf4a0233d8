"""Variable-length attention over packs, registered with transformers' attention interface.

A pack is several sequences laid end to end in one row; `cu_seq_lens_q` says where each begins, and no query sees a key
of another sequence. The same function serves the decoder (causal) and the vision tower (per frame or window).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

# transformers hands the vision tower's segment bounds to an attention function only if "flash" is in its name.
ATTENTION_NAME = "qvl_flash_varlen"

Kernel = Callable[..., Tensor]


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


def use_packed_attention(model: nn.Module, attn_implementation: str, device: torch.device) -> str:
    """Switch a model to attention over packs.

    Args:
        model: A transformers model.
        attn_implementation: `auto`, `flash_attention_2`, `flash_attention_3`, `torch_varlen`, `sdpa` or `eager`.
        device: Where the model will run.

    Returns:
        The kernel chosen, for the log.

    Raises:
        ValueError: The kernel is not installed or does not run on this device.
    """
    name = _best_kernel(device) if attn_implementation == "auto" else attn_implementation
    _require(name, device)
    kernel = _KERNELS[name]

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        cu_seq_lens_q: Tensor,
        max_length_q: int | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend within each sequence of a pack: query `[1, H, T, D]` to output `[1, T, H, D]`."""
        causal = module.is_causal if is_causal is None else is_causal
        return kernel(query, key, value, Segments(cu_seq_lens_q, max_length_q), scaling, causal), None

    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        # The setter that checks for an installed flash-attn is passed by: the kernel is ours.
        config._attn_implementation_internal = ATTENTION_NAME
    return name


def _best_kernel(device: torch.device) -> str:
    if device.type != "cuda":
        return "sdpa"
    if _installed("flash_attn_interface") and torch.cuda.get_device_capability(device)[0] == 9:
        return "flash_attention_3"
    return "flash_attention_2" if _installed("flash_attn") else "torch_varlen"


def _require(name: str, device: torch.device) -> None:
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(name)
    if package and not _installed(package):
        raise ValueError(
            f"attn_implementation '{name}' needs the package {package}, which is not installed: use 'auto'"
        )
    if name in ("flash_attention_2", "flash_attention_3", "torch_varlen") and device.type != "cuda":
        raise ValueError(f"attn_implementation '{name}' runs on CUDA only, and this is {device.type}: use 'auto'")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


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

    k, v = _repeat_heads(q, k, v)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    bounds, longest = segments.cu_seqlens, segments.longest
    # A window of (-1, 0) is causal attention: every earlier key, no later one.
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window)[None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, causal: bool) -> Tensor:
    options = {"is_causal": causal, "scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    return _by_length(q, k, v, segments, causal, partial(F.scaled_dot_product_attention, **options))


def _eager(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, causal: bool) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _repeat_heads(q, k, v)
        scores = (q @ k.transpose(2, 3)).float() * scaling
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    return _by_length(q, k, v, segments, causal, attend)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads for kernels without grouped-query attention."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _by_length(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, attend: Kernel) -> Tensor:
    """Attend to all sequences of (nearly) one length as one batch: one kernel call a length, not one a sequence.

    Causal sequences are rounded up in length, because queries never see the keys behind them: what is read there does
    not matter, and its output is dropped. Others are batched only with sequences of exactly their length.
    """
    bounds = segments.cu_seqlens.tolist()
    batches: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(bounds):
        length = end - start
        batches.setdefault(_rounded(length) if causal else length, []).append((start, end))
    if len(batches) == 1 and not causal:
        length = next(iter(batches))
        output = attend(*(x[0].unflatten(1, (-1, length)).transpose(0, 1) for x in (q, k, v)))
        return output.permute(0, 2, 1, 3).flatten(0, 1)[None]
    outputs, rows = [], []
    for length, sequences in batches.items():
        starts, ends = torch.tensor(sequences).T
        index = starts[:, None] + torch.arange(length)
        real = index < ends[:, None]
        gather = index.clamp(max=bounds[-1] - 1).flatten().to(q.device)
        batch = (x[0].index_select(1, gather).unflatten(1, (-1, length)).transpose(0, 1) for x in (q, k, v))
        keep = real.flatten().nonzero()[:, 0].to(q.device)
        outputs.append(attend(*batch).permute(0, 2, 1, 3).flatten(0, 1).index_select(0, keep))
        rows.append(index[real])
    order = torch.cat(rows).argsort().to(q.device)
    return torch.cat(outputs).index_select(0, order)[None]


def _rounded(length: int) -> int:
    """Round a length up to a multiple of an eighth of the power of two above it, so that at most 1/8 is wasted."""
    step = max(8, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


_KERNELS: dict[str, Kernel] = {
    "flash_attention_2": _flash_attention_2,
    "flash_attention_3": _flash_attention_3,
    "torch_varlen": _torch_varlen,
    "sdpa": _sdpa,
    "eager": _eager,
}

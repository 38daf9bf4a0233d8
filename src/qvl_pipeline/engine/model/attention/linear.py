"""Linear attention over packs: Gated DeltaNet layers whose convolution and state end with each sample.

Such a layer reads a row from left to right with a state (Yang et al., "Gated Delta Networks", arXiv:2412.06464), behind
a short convolution. Given a pack as one row, both would run on from a sample into the next. transformers' own forward
can cut them only with two packages for GPUs, so this one composes the same submodules, and cuts wherever it runs.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from qvl_pipeline.engine.model.attention.equal_lengths import eighths, equal_lengths
from qvl_pipeline.engine.parallel.sequence_parallel import gather_heads, trade_channels
from qvl_pipeline.families import ModelFamily

# Distribution names, as they are installed, of the packages that the kernels are from.
_PACKAGES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
# Tokens that the delta rule works on at once: rows shorter than that cost as much.
_CHUNK = 64

Mix = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def choose_linear_kernel(name: str, device: torch.device, *, half: bool) -> str:
    """Choose the kernels of linear attention.

    Args:
        name: `linear_attn_implementation`: `auto`, `fla` or `torch`.
        device: Where the model runs.
        half: It computes in bfloat16 or float16.

    Returns:
        `fla` or `torch`.

    Raises:
        ValueError: A package is missing on a GPU, or the kernels were asked for by name where they do not run.
    """
    if name == "torch" or (name == "auto" and (device.type != "cuda" or not half)):
        return "torch"
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    reason = None
    if missing:
        reason = (
            f"needs the package {' and '.join(missing)}, which is not installed: uv pip install {' '.join(missing)}"
        )
    elif device.type != "cuda":
        reason = f"runs on CUDA only, and this is {device.type}: use 'auto'"
    elif not half:
        reason = "computes in bfloat16 or float16 only, and neither bf16 nor fp16 is set: use 'auto'"
    if reason:
        slower = ", or use 'torch', which trains 1.5 to 2.5 times slower on a GPU" if missing else ""
        raise ValueError(f"linear_attn_implementation '{name}' {reason}{slower}")
    return "fla"


def use_packed_linear_attention(
    model: nn.Module,
    family: ModelFamily,
    linear_attn_implementation: str,
    device: torch.device,
    *,
    half: bool = False,
    sp_group: dist.ProcessGroup | None = None,
) -> str:
    """Let the linear-attention layers of a model cut packs into their samples.

    Rows that are no packs (padded ones, prompts of a generation) are left to transformers' own forward.

    Args:
        model: A transformers model of the family.
        family: Its family, which has linear attention.
        linear_attn_implementation: `auto`, `fla` or `torch`.
        device: Where the model will run.
        half: It will compute in bfloat16 or float16.
        sp_group: Ranks that share the tokens of a pack, if any.

    Returns:
        The kernels chosen, for the log.

    Raises:
        ValueError: They do not run here.
    """
    kernel = choose_linear_kernel(linear_attn_implementation, device, half=half)
    for module in model.modules():
        if type(module).__name__ == family.linear_attention:
            unpacked = MethodType(type(module).forward, module)
            module.forward = partial(_forward, module, unpacked, KERNELS[kernel], sp_group)
    return kernel


def _forward(
    module: nn.Module,
    unpacked: Callable[..., Tensor],
    mix: Mix,
    sp_group: dist.ProcessGroup | None,
    hidden_states: Tensor,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Compute a layer `[1, T, H]` to `[1, T, H]`: projections of each token, and between them what samples share."""
    if cu_seq_lens_q is None:
        return unpacked(hidden_states, **others)
    # Queries, keys and values; then how strongly a token is written, and how much of the state it leaves.
    channels = [module.key_dim, module.key_dim, module.value_dim]
    parts = module.in_proj_qkv(hidden_states).split(channels, dim=-1)
    parts = (*parts, module.in_proj_b(hidden_states), module.in_proj_a(hidden_states))
    gates = module.in_proj_z(hidden_states).unflatten(-1, (-1, module.head_v_dim))
    filters, decay, bias = module.conv1d.weight.squeeze(1), module.A_log, module.dt_bias
    if sp_group is not None:
        parts = trade_channels(parts, sp_group)
        rank, degree = sp_group.rank(), sp_group.size()
        filters = torch.cat([part.chunk(degree)[rank] for part in filters.split(channels)])
        decay, bias = (values.chunk(degree)[rank] for values in (decay, bias))
    *qkv, strength, forgetting = parts
    # In float32, as in transformers: in float16 the exponential can be infinite.
    log_decay = -decay.float().exp() * F.softplus(forgetting.float() + bias)
    output = mix(module, torch.cat(qkv, dim=-1), filters, log_decay, strength.sigmoid(), cu_seq_lens_q)
    if sp_group is not None:
        output = gather_heads(output, sp_group)
    normed = module.norm(output.flatten(0, 2), gates.flatten(0, 2)).view_as(output)
    return module.out_proj(normed.flatten(2))


def _heads(module: nn.Module, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide `[B, T, C]` into queries, keys and values `[B, T, heads, width]`, of all heads or of a rank's."""
    total = module.key_dim * 2 + module.value_dim
    key, value = (size * qkv.shape[-1] // total for size in (module.key_dim, module.value_dim))
    widths = module.head_k_dim, module.head_k_dim, module.head_v_dim
    parts = qkv.split([key, key, value], dim=-1)
    return tuple(part.unflatten(-1, (-1, width)) for part, width in zip(parts, widths, strict=True))


def _fla(
    module: nn.Module, qkv: Tensor, filters: Tensor, log_decay: Tensor, strength: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Compute a pack by kernels that know where its samples end."""
    from causal_conv1d import causal_conv1d_fn
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tokens = torch.arange(qkv.shape[1], device=qkv.device)
    sample_of = torch.searchsorted(cu_seqlens[1:], tokens, right=True).int()[None]
    mixed = causal_conv1d_fn(qkv.transpose(1, 2), filters, None, seq_idx=sample_of, activation=module.activation)
    query, key, value = _heads(module, mixed.transpose(1, 2))
    return chunk_gated_delta_rule(
        query,
        key,
        value,
        g=log_decay,
        beta=strength,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=cu_seqlens,
    )[0]


@torch.compiler.disable(reason="the lengths of samples are read on the host")
def _by_sample(
    module: nn.Module, qkv: Tensor, filters: Tensor, log_decay: Tensor, strength: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Compute the samples of a pack each in a row of its own, those of nearly one length together."""
    batches, order = equal_lengths(tuple(cu_seqlens.tolist()), _whole_chunks, qkv.device)
    outputs = []
    for batch in batches:
        rows = [
            values[0].index_select(0, batch.gather).unflatten(0, (-1, batch.length))
            for values in (qkv, log_decay, strength)
        ]
        outputs.append(_rows(module, filters, *rows).flatten(0, 1).index_select(0, batch.keep))
    return torch.cat(outputs).index_select(0, order)[None]


def _rows(module: nn.Module, filters: Tensor, qkv: Tensor, log_decay: Tensor, strength: Tensor) -> Tensor:
    """Compute rows of one sample each by the functions that transformers has for want of the packages."""
    mixed = _of_transformers(module, "causal_conv1d_fn")(qkv.transpose(1, 2), filters, None, module.activation)
    query, key, value = _heads(module, mixed.transpose(1, 2))
    rule = _of_transformers(module, "torch_chunk_gated_delta_rule")
    return rule(query, key, value, g=log_decay, beta=strength, use_qk_l2norm_in_kernel=True)[0]


def _of_transformers(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return a function of a layer's own file, without what would exchange it for a kernel that is installed."""
    return inspect.unwrap(getattr(sys.modules[type(module).__module__], name))


def _whole_chunks(length: int) -> int:
    return -(-eighths(length) // _CHUNK) * _CHUNK


KERNELS: dict[str, Mix] = {"fla": _fla, "torch": _by_sample}

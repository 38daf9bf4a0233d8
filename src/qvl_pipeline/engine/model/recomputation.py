"""Gradient checkpointing: less memory for activations, a second forward pass of the blocks or of its cheap part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from qvl_pipeline.engine.spec import RecomputeSpec

# The last is that of all experts of a layer, on a CPU and on a GPU alike.
_NAMES = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
_PRODUCTS = frozenset(getattr(torch.ops.aten, name).default for name in _NAMES)
# torch's own attention on all devices, its varlen attention, and both packages of FlashAttention.
_ATTENTION = ("aten::_scaled_dot_product_", "aten::_flash_attention_forward", "torch_attn::", "flash_attn")
# A product is of a low rank where each number that it puts out costs this many times fewer multiplications than there
# are numbers in a row. What LoRA's second matrix puts out is as large as what its layer does, and made in no time.
_LOW_RANK = 8


def recompute_activations(hf: nn.Module, spec: RecomputeSpec) -> dict[str, int]:
    """Let blocks recompute their activations in the backward pass; what they compute stays the same, bit for bit.

    transformers' own switch is for whole models: it would also let gradients flow to the input of a frozen tower, which
    only reentrant checkpointing needs, and which costs a backward pass through all of it.

    Args:
        hf: The transformers model.
        spec: How much is recomputed in which tower, and where the inputs of its blocks are kept.

    Returns:
        Number of blocks that recompute, by tower.
    """
    recomputed = {}
    towers = [("llm", hf.model.language_model, spec.llm), ("vit", hf.model.visual, spec.vit)]
    if hasattr(hf.model, "audio_tower"):
        towers.append(("audio", hf.model.audio_tower, spec.vit))  # it is worked as a vision tower is
    for tower, module, kind in towers:
        if kind == "none":
            continue
        run = _RUN[kind]
        blocks = [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)][:: spec.every]
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(_offloaded, run=run) if spec.offload else run
        recomputed[tower] = len(blocks)
    return recomputed


def _full(*block_and_inputs: Any) -> Any:
    return checkpoint(*block_and_inputs, use_reentrant=False)


def _selective(*block_and_inputs: Any) -> Any:
    return checkpoint(*block_and_inputs, use_reentrant=False, context_fn=_selective_contexts)


_RUN = {"full": _full, "selective": _selective}


def _offloaded(*block_and_inputs: Any, run: Callable[..., Any]) -> Any:
    """Run a block. Of its tensors only the inputs meet this hook: all others are checkpoint's own to keep."""
    with save_on_cpu(pin_memory=True):
        return run(*block_and_inputs)


def _selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_keep)


def _keep(_context: Any, op: Any, *args: Any, **_: Any) -> CheckpointPolicy:
    """Keep what matrix products and attention put out: nearly all of a block's work, and a third of its memory."""
    keeps = not _is_low_rank(args) if op in _PRODUCTS else op.name().startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def _is_low_rank(args: tuple[Any, ...]) -> bool:
    """Whether a product `[…, k] x [k, n]`, the last two matrices of these, has a `k` far below `n`."""
    inner, outer = next(arg for arg in reversed(args) if isinstance(arg, torch.Tensor) and arg.ndim > 1).shape[-2:]
    return inner * _LOW_RANK < outer

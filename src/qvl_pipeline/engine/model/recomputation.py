"""Gradient checkpointing: less memory for activations, a second forward pass of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_activations(hf: nn.Module, towers: Sequence[str]) -> None:
    """Let the blocks of some towers recompute their activations in the backward pass.

    transformers' own switch is for whole models: it would also let gradients flow to the input of a frozen tower, which
    only reentrant checkpointing needs, and which costs a backward pass through all of it.

    Args:
        hf: The transformers model.
        towers: `llm` and `vit`, or one of them.
    """
    modules = {"llm": hf.model.language_model, "vit": hf.model.visual}
    for tower in towers:
        for block in modules[tower].modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

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
        towers: `llm`, `vit`, or both; with the vision tower an audio tower, where there is one.
    """
    vit = [hf.model.visual, *([hf.model.audio_tower] if hasattr(hf.model, "audio_tower") else [])]
    modules = {"llm": [hf.model.language_model], "vit": vit}
    for tower in towers:
        for block in (block for module in modules[tower] for block in module.modules()):
            if isinstance(block, GradientCheckpointingLayer):
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

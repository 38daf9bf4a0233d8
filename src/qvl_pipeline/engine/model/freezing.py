"""Which parameters are trained."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from qvl_pipeline.families import ModelFamily

# The guide's `visual` is the whole vision side: encoder, merger and DeepStack mergers.
ALIASES = {"visual": ("vit", "merger", "deepstack")}
# Groups that not every micro-batch takes part in, by tower.
OF_VISION, OF_SOUND = frozenset(ALIASES["visual"]), frozenset({"audio", "audio_projector"})


def freeze(model: nn.Module, family: ModelFamily, patterns: Sequence[str]) -> dict[str, int]:
    """Freeze the parameters that any pattern names.

    Args:
        model: The transformers model.
        family: Its family.
        patterns: Group names (`vit`, `merger`, `deepstack`, `audio`, `audio_projector`, `llm`, `embed`, `head`),
            `visual`, or globs over names.

    Returns:
        Number of frozen parameters (scalars) by pattern.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left to train.
    """
    frozen = {}
    for pattern in patterns:
        matched = matched_parameters(model, family, pattern, "freeze_modules")
        for parameter in matched.values():
            parameter.requires_grad_(False)
        frozen[pattern] = sum(parameter.numel() for parameter in matched.values())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze_modules {list(patterns)} leaves nothing to train")
    return frozen


def matched_parameters(model: nn.Module, family: ModelFamily, pattern: str, of: str) -> dict[str, nn.Parameter]:
    """Find the parameters of a part, of an alias, or of a glob over names.

    Args:
        model: The transformers model.
        family: Its family.
        pattern: The name or glob.
        of: The parameter that has it, for the message.

    Raises:
        ValueError: There are none.
    """
    groups = ALIASES.get(pattern, (pattern,))
    matched = {
        name: parameter
        for name, parameter in model.named_parameters()
        if family.group_of(name) in groups or fnmatch.fnmatchcase(name, pattern)
    }
    if not matched:
        known = sorted({family.group_of(name) for name, _ in model.named_parameters()} | set(ALIASES))
        raise ValueError(
            f"{of}: '{pattern}' matches no parameter of {family.name}; "
            f"use one of {', '.join(known)}, or a glob such as 'model.visual.blocks.0.*'"
        )
    return matched


def always_called(model: nn.Module, family: ModelFamily) -> dict[str, bool]:
    """Which towers are called in every micro-batch, because nothing but towers is trained, and they are.

    Args:
        model: The transformers model.
        family: Its family.
    """
    trained = {family.group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    only_towers = trained <= OF_VISION | OF_SOUND
    return {
        "always_vision": only_towers and bool(trained & OF_VISION),
        "always_sound": only_towers and bool(trained & OF_SOUND),
    }


def hold_parameters(model: nn.Module, *, trained: torch.dtype, frozen: torch.dtype) -> None:
    """Set the types in which a model on the meta device holds its parameters; buffers keep theirs.

    What is frozen is never stepped, so beside the type of the computation, in which FSDP2 gathers it anyway, a float32
    master would be memory for nothing.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)

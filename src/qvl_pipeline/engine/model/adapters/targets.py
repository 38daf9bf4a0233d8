"""What is adapted: linear layers and experts, by parts of a model, and kinds of layers or globs within each."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from qvl_pipeline.engine.model.adapters.experts import fused_tensors
from qvl_pipeline.engine.model.freezing import ALIASES
from qvl_pipeline.families import ModelFamily

# Kinds of layers by the module that they are in; layers of an audio tower have their MLP without one.
_KINDS = {"self_attn": "attention", "linear_attn": "attention", "attn": "attention", "mlp": "mlp", "experts": "experts"}
_KINDS |= {"fc1": "mlp", "fc2": "mlp"}


def choose_targets(
    model: nn.Module,
    family: ModelFamily,
    targets: Mapping[str, str | Sequence[str]],
    of: str = "adapter.targets",
) -> list[str]:
    """Choose linear layers, to adapt or to quantise, and fused tensors of experts, to adapt.

    Args:
        model: The transformers model; a skeleton on the meta device will do.
        family: Its family.
        targets: For each part: `all` of its linear layers, `none`, or a list of kinds (`attention`, `mlp`, `experts`)
            and globs over their names. Only layers of the part are looked at, so no pattern can hit another one.
        of: The parameter that has them, for the message.

    Returns:
        Names of linear layers, and behind them of fused tensors, in the order of the model.

    Raises:
        ValueError: Something that is named matches no layer, or nothing is named.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fused = fused_tensors(model)
    parts: dict[str, list[str]] = {}
    for name in (*linear, *fused):
        parts.setdefault(family.group_of(f"{name}."), []).append(name)
    chosen: set[str] = set()
    for named, wanted in targets.items():
        if wanted == "none":
            continue
        layers = [name for part in ALIASES.get(named, (named,)) for name in parts.get(part, ())]
        if not layers:
            known = ", ".join(part for part in parts if part != "head")
            raise ValueError(f"{of}: {family.title} has no linear layers in '{named}', but in {known}")
        if wanted == "all":
            chosen.update(name for name in layers if name not in fused)
            continue
        for pattern in wanted:
            matched = [name for name in layers if pattern == _kind(name) or fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(_matches_nothing(named, pattern, layers))
            chosen.update(matched)
    if not chosen:
        raise ValueError("adapter.targets names no part to adapt: name one, such as {llm: all}")
    return [name for name in (*linear, *fused) if name in chosen]


def _kind(name: str) -> str | None:
    return next((_KINDS[part] for part in reversed(name.split(".")) if part in _KINDS), None)


def _matches_nothing(part: str, pattern: str, layers: Sequence[str]) -> str:
    kinds = sorted({kind for name in layers if (kind := _kind(name))})
    options = [*([f"one of {', '.join(kinds)}"] if kinds else []), f"a glob such as '*.{layers[0].split('.')[-1]}'"]
    return f"adapter.targets: '{pattern}' matches no linear layer of '{part}': use all, {' or '.join(options)}"

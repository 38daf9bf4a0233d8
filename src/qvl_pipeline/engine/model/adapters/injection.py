"""A frozen model with adapted layers in place of linear ones: what is trained of it is what was named, by name.

And with quantised ones, where the adapted model is too large as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import nn

from qvl_pipeline.engine.model.adapters.adapted import adapted_layers
from qvl_pipeline.engine.model.adapters.experts import adapt_experts, fused_tensors
from qvl_pipeline.engine.model.adapters.form import Form, scaling_of
from qvl_pipeline.engine.model.adapters.frozen import FrozenLinear
from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear
from qvl_pipeline.engine.model.adapters.targets import choose_targets
from qvl_pipeline.engine.model.freezing import matched_parameters
from qvl_pipeline.engine.spec import AdapterSpec
from qvl_pipeline.families import ModelFamily

# What a linear layer has.
_OWN = ("weight", "bias")


def inject(model: nn.Module, family: ModelFamily, spec: AdapterSpec) -> dict[str, Any]:
    """Freeze a model, adapt the layers that are named, and train in full what is to be; before anything shards it.

    Args:
        model: The transformers model, on the meta device.
        family: Its family.
        spec: The adapter.

    Returns:
        Facts for `result.json`: what the adapter is, adapted layers by class and number, and what is trained in full.

    Raises:
        ValueError: A target or a part matches nothing, something is to be trained in full and adapted or quantised, or
            experts are to be adapted in a way that they cannot be.
    """
    model.requires_grad_(False)
    names = choose_targets(model, family, spec.targets)
    _check_experts(names, fused_tensors(model), spec)
    owners = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in names}
    adapt(model, names, form_of(spec))
    fully = {}
    taken = {f"{name}.{own}": "quantize_parts quantises" for name in _quantized(model, family, spec) for own in _OWN}
    taken |= {other: "targets adapts" for name in names for other in (name, *(f"{name}.{own}" for own in _OWN))}
    for pattern in spec.train_fully:
        matched = matched_parameters(model, family, pattern, "adapter.train_fully")
        if both := sorted(taken.keys() & matched.keys()):
            raise ValueError(
                f"adapter.train_fully: '{pattern}' would train '{both[0]}', which adapter.{taken[both[0]]}: name it in "
                "one of the two"
            )
        for parameter in matched.values():
            parameter.requires_grad_(True)
        fully[pattern] = sum(parameter.numel() for parameter in matched.values())
    kinds = Counter(f"{owner}.{name.rpartition('.')[2]}" for name, owner in owners.items())
    return {"type": spec.type, "r": spec.r, "modules": dict(sorted(kinds.items())), "trained_fully": fully}


def _check_experts(names: Sequence[str], fused: Container[str], spec: AdapterSpec) -> None:
    """Refuse for experts what peft's format cannot say of fused tensors: nobody else could read such an adapter."""
    asked = {"type 'dora'": spec.type == "dora", "init 'pissa'": spec.init == "pissa", "dropout": spec.dropout > 0}
    adapted = next((name for name in names if name in fused), None)
    refused = next((what for what, is_asked in asked.items() if is_asked), None)
    if adapted and refused:
        raise ValueError(
            f"adapter.targets: '{adapted}' is a fused tensor of experts, of which peft's format knows plain LoRA only: "
            f"take out {refused}, or 'experts' and the globs that match them"
        )


def quantize_base(model: nn.Module, family: ModelFamily, spec: AdapterSpec) -> dict[str, Any]:
    """Let the matrices of the parts that are named be quantised ones; before anything shards or fills them.

    Args:
        model: The transformers model with its adapters, on the meta device.
        family: Its family.
        spec: The adapter.

    Returns:
        Facts for `result.json`: how, how many matrices, of how many parameters.
    """
    names = _quantized(model, family, spec)
    numbers = sum(model.get_submodule(name).weight.numel() for name in names)
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, FrozenLinear):
            parent, _, own = name.rpartition(".")
            layer = FrozenLinear(layer)
            setattr(model.get_submodule(parent), own, layer)
        layer.quantize(double=spec.double_quant)
    return {"type": spec.quantize_base, "double": spec.double_quant, "matrices": len(names), "parameters": numbers}


def _quantized(model: nn.Module, family: ModelFamily, spec: AdapterSpec) -> list[str]:
    """Names of the layers whose matrices are quantised: all linear ones of the parts, adapted or not."""
    if not spec.quantizes:
        return []
    return choose_targets(model, family, dict.fromkeys(spec.quantize_parts, "all"), "adapter.quantize_parts")


def form_of(spec: AdapterSpec) -> Form:
    """What all adapted layers of a run have in common."""
    scaling = scaling_of(spec.alpha, spec.r, rslora=spec.rslora)
    return Form(spec.r, scaling, spec.dropout, dora=spec.type == "dora", pissa=spec.init == "pissa")


def adapt(model: nn.Module, names: Iterable[str], form: Form) -> None:
    """Adapt the linear layers and the fused tensors of these names; the values of the update are still to be set."""
    fused = fused_tensors(model)
    for name in names:
        if name in fused:
            adapt_experts(model, name, form)
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, AdaptedLinear(model.get_submodule(name), form))


def enable(model: nn.Module, enabled: bool) -> None:
    """Let a model answer with its adapters, or without: as the base model, bit for bit."""
    for _, layer in adapted_layers(model):
        layer.enabled = enabled

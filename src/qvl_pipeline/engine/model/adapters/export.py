"""A trained adapter as a folder that peft reads, beside the merged model or in place of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qvl_pipeline.engine.model.adapters.adapted import adapted_layers, base_sizes
from qvl_pipeline.engine.model.adapters.experts import ExpertsUpdate, fused_tensors
from qvl_pipeline.engine.model.adapters.files import write_adapter
from qvl_pipeline.engine.model.adapters.form import Form
from qvl_pipeline.engine.model.adapters.linear import row_lengths_of
from qvl_pipeline.engine.model.adapters.values import gathered, gathered_adapter
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.weight_files import StoredWeights
from qvl_pipeline.engine.spec import AdapterSpec, TrainSpec

logger = logging.getLogger(__name__)


def export_adapter(model: PackedVLM, spec: TrainSpec, folder: Path | None) -> None:
    """Write the adapter of a model; called by all ranks, of which those that give no folder only take part.

    Raises:
        ValueError: The base model's weights can no longer be read.
    """
    stored = StoredWeights(spec.model.path, model.family, base_sizes(model.hf)) if folder else None
    layers: dict[str, dict[str, torch.Tensor]] = {}
    experts = []
    for name, layer in adapted_layers(model.hf):
        adapter = gathered_adapter(layer)
        if stored is not None:
            layers[name] = _in_peft_form(adapter, layer.form, partial(stored.read, f"{name}.weight"))
        if isinstance(layer, ExpertsUpdate):
            experts.append(name)
    own = {id(p) for _, layer in adapted_layers(model.hf) for p in layer.parameters(recurse=False)}
    trained = {n: p for n, p in model.hf.named_parameters() if p.requires_grad and id(p) not in own}
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    fully = {}
    for module in modules:  # peft stores modules whole
        for name, parameter in model.hf.get_submodule(module).named_parameters(prefix=module, recurse=False):
            fully[name] = gathered(parameter)
    if folder is None:
        return
    write_adapter(folder, _config(spec, list(layers), experts, modules), layers, fully)
    if why_not := why_not_vllm(model, list(layers), modules, spec.adapter):
        logger.warning("%s", why_not)


def why_not_vllm(model: PackedVLM, adapted: Sequence[str], modules: Sequence[str], spec: AdapterSpec) -> str:
    """Say why vLLM will not serve an adapter as one, where it will not: it knows plain LoRA of the language model.

    Args:
        model: The model.
        adapted: Names of adapted layers and fused tensors.
        modules: Names of modules that are trained in full.
        spec: The adapter.
    """
    vision = sorted({model.family.group_of(f"{name}.weight") for name in adapted} - {"llm"})
    reasons = [f"changes {' and '.join(vision)}"] if vision else []
    reasons += ["changes experts"] if fused_tensors(model.hf).keys() & set(adapted) else []
    reasons += ["has modules trained in full"] if modules else []
    reasons += ["is DoRA"] if spec.type == "dora" else []
    if not reasons:
        return ""
    return (
        f"the adapter {', '.join(reasons)}: vLLM serves LoRA of the language model only, so serve the merged model "
        "(adapter.export: merged or both)"
    )


def _in_peft_form(
    adapter: dict[str, torch.Tensor], form: Form, weight: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What was subtracted becomes rank of its own, and lengths of rows are whole."""
    adapter = {name: tensor.float() for name, tensor in adapter.items()}
    if form.pissa:
        adapter["lora_A"] = torch.cat([adapter["lora_A"], adapter.pop("lora_A0")])
        adapter["lora_B"] = torch.cat([adapter["lora_B"], -adapter.pop("lora_B0")], 1)
    if form.dora:
        adapter["lora_magnitude"] = row_lengths_of(weight()) + adapter["lora_magnitude"]
    return adapter


def _config(spec: TrainSpec, targets: list[str], experts: list[str], modules_to_save: list[str]) -> dict[str, Any]:
    adapter = spec.adapter
    r, alpha = adapter.r, adapter.alpha
    if adapter.init == "pissa":  # twice the rank under the same scaling
        r, alpha = 2 * r, alpha * (2**0.5 if adapter.rslora else 2)
    return {
        "base_model_name_or_path": spec.model.path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": r,
        # Whole names: a suffix such as `gate_proj` would hit the vision tower of Qwen2.5-VL as well.
        "target_modules": [name for name in targets if name not in experts],
        **({"target_parameters": experts} if experts else {}),
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.type == "dora",
        "use_rslora": adapter.rslora,
    }

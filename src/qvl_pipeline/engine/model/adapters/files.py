"""Adapters on disk, in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

Of fused tensors of experts (`target_parameters`) peft stacks the factors of all experts into two matrices: `lora_A
[experts * r, in]`, one expert after the other, and `lora_B [out, r * experts]`, of which an expert has every so many
columns. It wraps a module once for each of its tensors, so all but the last are called `base_layer` once more.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qvl_pipeline.engine.model.adapters.experts import FUSED

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _WRAPPED = "base_model.model.", ".base_layer"
# peft's names of what it adds to a layer, and ours.
_NAMES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "lora_magnitude"}
# What peft can do and we cannot, by the key of its configuration: loaded without it, the adapter would be another one.
_UNKNOWN = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "fan_in_fan_out", "layer_replication"),
    *("lora_bias", "rank_pattern", "trainable_token_indices", "use_bdlora", "use_qalora"),
)
# Ways to start that leave the base model as it is.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it is stored.

    Attributes:
        r: Rank.
        alpha: Factor before it is divided by the rank.
        rslora: It is divided by the root of the rank.
        dora: Rows have lengths of their own.
        layers: `lora_A`, `lora_B` and, for DoRA, `lora_magnitude` (the rows' lengths) by the name of a linear layer, or
            of a fused tensor: then `[experts, r, in]` and `[experts, out, r]`.
        experts: Which of these names are those of fused tensors.
        fully: Parameters that were trained in full, by name.
        base: Name of the base model, as its author wrote it.
    """

    r: int
    alpha: float
    rslora: bool
    dora: bool
    layers: dict[str, dict[str, torch.Tensor]]
    experts: frozenset[str]
    fully: dict[str, torch.Tensor]
    base: str

    @property
    def type(self) -> str:
        """As in `adapter.type`."""
        return "dora" if self.dora else "lora"


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read an adapter.

    Raises:
        ValueError: It is not there, or it is of a kind that is not known here.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of a LoRA adapter in peft's format")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    _check(folder, config)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    fully = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name = key.removeprefix(_PREFIX)
        own = next((own for own in _NAMES if name.endswith(f".{own}")), None)
        if own:
            layers.setdefault(name.removesuffix(f".{own}"), {})[_NAMES[own]] = tensor
        else:
            fully[name] = tensor
    names = _names_of_tensors(layers, config.get("target_parameters") or ())
    for module, name in names.items():
        layers[name] = _by_expert(layers.pop(module), config["r"])
    return StoredAdapter(
        r=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        layers=layers,
        experts=frozenset(names.values()),
        fully=fully,
        base=config.get("base_model_name_or_path") or "",
    )


def _names_of_tensors(modules: Collection[str], targets: Collection[str]) -> dict[str, str]:
    """Return which of the modules that peft adapted are fused tensors, and what each of them is called.

    Args:
        modules: Names of modules as peft has them.
        targets: `target_parameters`: names, or what they end with.
    """
    names = {}
    for module in modules:
        owner = module.removesuffix(_WRAPPED)
        adapted = [own for own in FUSED if any(f".{owner}.{own}".endswith(f".{target}") for target in targets)]
        if adapted:  # those before the last are wrapped by it
            names[module] = f"{owner}.{adapted[0 if owner != module else -1]}"
    return names


def _by_expert(stacked: Mapping[str, torch.Tensor], r: int) -> dict[str, torch.Tensor]:
    a, b = stacked["lora_A"], stacked["lora_B"]
    return {"lora_A": a.unflatten(0, (-1, r)), "lora_B": b.unflatten(1, (r, -1)).permute(2, 0, 1).contiguous()}


def _stacked(by_expert: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    a, b = by_expert["lora_A"], by_expert["lora_B"]
    return {"lora_A": a.flatten(0, 1), "lora_B": b.permute(1, 2, 0).flatten(1)}


def _in_peft_names(layers: Mapping[str, Mapping[str, torch.Tensor]], experts: Collection[str]) -> dict[str, Any]:
    """Name and stack the factors of experts as peft does."""
    named = {}
    for name, adapter in layers.items():
        owner, _, own = name.rpartition(".")
        if name not in experts:
            named[name] = adapter
            continue
        outer = [other for other in FUSED[FUSED.index(own) + 1 :] if f"{owner}.{other}" in experts]
        named[owner + _WRAPPED * len(outer)] = _stacked(adapter)
    return named


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {config.get('peft_type')}: only LORA is known here")
    for key in _UNKNOWN:
        if config.get(key) not in (None, False, {}, [], "none"):
            raise ValueError(
                f"{folder / CONFIG} has {key} = {json.dumps(config[key])}, which is not known here: make an adapter "
                "without it, or merge it with peft and start from the merged model"
            )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{folder / CONFIG} has init_lora_weights = {json.dumps(start)}: its base model was changed with it, so it "
            "fits no other; convert it with peft (path_initial_model_for_weight_conversion), or merge it"
        )


def write_adapter(
    folder: Path, config: Mapping[str, Any], layers: Mapping[str, Mapping[str, torch.Tensor]], fully: Mapping[str, Any]
) -> None:
    """Write an adapter; `layers` and `fully` as in `StoredAdapter`, and its experts are `target_parameters`."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {ours: name for name, ours in _NAMES.items()}
    tensors = {
        f"{_PREFIX}{name}.{theirs[own]}": tensor.contiguous()
        for name, adapter in _in_peft_names(layers, config.get("target_parameters") or ()).items()
        for own, tensor in adapter.items()
    } | {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in fully.items()}
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

"""Adapters on disk, in peft's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# peft's names of what it adds to a layer, and ours.
_NAMES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "lora_magnitude"}
# What peft can do and we cannot, by the key of its configuration: loaded without it, the adapter would be another one.
_UNKNOWN = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "fan_in_fan_out", "layer_replication"),
    *("lora_bias", "rank_pattern", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
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
        layers: `lora_A`, `lora_B` and, for DoRA, `lora_magnitude` (the rows' lengths) by module name.
        fully: Parameters that were trained in full, by name.
        base: Name of the base model, as its author wrote it.
    """

    r: int
    alpha: float
    rslora: bool
    dora: bool
    layers: dict[str, dict[str, torch.Tensor]]
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
    return StoredAdapter(
        r=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        layers=layers,
        fully=fully,
        base=config.get("base_model_name_or_path") or "",
    )


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
    """Write an adapter; `layers` and `fully` as in `StoredAdapter`."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {ours: name for name, ours in _NAMES.items()}
    tensors = {
        f"{_PREFIX}{name}.{theirs[own]}": tensor.contiguous()
        for name, adapter in layers.items()
        for own, tensor in adapter.items()
    } | {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in fully.items()}
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

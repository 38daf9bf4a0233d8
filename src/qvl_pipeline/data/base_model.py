"""`base_model`: the folder that says which model a profile starts from, and for which parameters it was prepared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_pipeline.config import ModelConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.families import FAMILIES

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BaseModel:
    """What `manifest.json` says, with places filled in.

    Attributes:
        path: Folder or hub id for `from_pretrained`.
        processor: The same of its processor.
        family: Its family.
        parameters: Parameters of the model that it and its tokens were made for.
        is_own: Whether it lies in the folder itself, as a tiny model does.
    """

    path: str
    processor: str
    family: str
    parameters: dict[str, Any]
    is_own: bool


def read_base_model(folder: Path) -> BaseModel:
    """Read the catalog entry `base_model`."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    path = str(folder.resolve()) if manifest["path"] == "." else manifest["path"]
    return BaseModel(
        path=path,
        processor=manifest.get("processor") or path,
        family=manifest.get("family", ""),
        parameters=manifest.get("parameters", {}),
        is_own=manifest["path"] == ".",
    )


def write_manifest(folder: Path, model: ModelConfig) -> None:
    """Write the manifest of the model that the parameters name: a pretrained one, or the tiny one in the folder."""
    manifest = {"path": ".", "family": model.processor_type, "parameters": model.decisive("tokens")}
    if name := model.load_from_pretrained_path:
        manifest |= {"path": name, "processor": model.processor_name or name}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def check_family(name: str, family: str) -> None:
    """Refuse a pretrained model that is not there, or of another family; its configuration is read and nothing else.

    Args:
        name: `model.load_from_pretrained_path`.
        family: `model.processor_type`.

    Raises:
        UserError: It is.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.load_from_pretrained_path '{name}' is neither a model folder nor a hub id that can be read here: "
            f"{reason}; check the name and the network, set HF_TOKEN where the model asks for a login, or give the "
            "folder of a copy"
        ) from error
    if config.model_type not in (FAMILIES[family].model_types or (family,)):
        raise UserError(f"model '{name}' is of type {config.model_type}, but model.processor_type is {family}")


def check_weights(name: str) -> None:
    """See that the safetensors files of a pretrained model are there; of the hub, only their index is fetched.

    Args:
        name: `model.load_from_pretrained_path`.

    Raises:
        UserError: There are none, some that the index names are missing, or the hub does not answer.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import has_file

    try:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        content = json.loads(Path(index).read_text(encoding="utf-8")) if index else {}
        files = sorted(set(content["weight_map"].values())) if index else [SAFE_WEIGHTS_NAME]
        missing = [file for file in files if not has_file(name, file)]  # offline, of what is in the hub's cache
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights of the base model '{name}' cannot be found: {reason}") from error
    if missing:
        what = f"{SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: only safetensors are read"
        if index:
            what = f"{missing[0]} ({len(missing)} of the {len(files)} files that its index names are missing)"
        raise UserError(f"the base model '{name}' of model.load_from_pretrained_path has no {what}")


def check_prepared(folder: Path, model: ModelConfig) -> None:
    """Refuse a base model, and with it tokens, that were prepared for other parameters of the model.

    Args:
        folder: The catalog entry `base_model`.
        model: Parameters of the model.

    Raises:
        UserError: Names the first parameter that differs, and the command to run.
    """
    prepared = read_base_model(folder).parameters
    for key, value in model.decisive("tokens").items():
        if prepared.get(key) != value:
            raise UserError(
                f"base model and tokens were prepared with model.{key} = {prepared.get(key)!r}, but this run has "
                f"{value!r}: run `kedro run --pipelines sample,tokenize` (with the same --env and --params) first"
            )

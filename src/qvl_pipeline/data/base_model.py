"""`base_model`: the folder that says which model a profile starts from, and for which parameters it was prepared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_pipeline.config import ModelConfig
from qvl_pipeline.errors import UserError

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

"""Where the safetensors files of a model are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from qvl_pipeline.families import ModelFamily


def weights_folder(path: str) -> Path:
    """Return the folder of the safetensors files, fetched from the hub where need be.

    Args:
        path: Folder or hub id.

    Raises:
        ValueError: There are none.
    """
    options = {"_raise_exceptions_for_missing_entries": False}
    if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options):
        files, _ = get_checkpoint_shard_files(path, index)
        return Path(files[0]).parent
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **options):
        return Path(single).parent
    raise ValueError(f"'{path}' has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: only safetensors are read")


class StoredWeights:
    """The weights of a Hugging Face folder, read one at a time.

    Attributes:
        kept: Bytes of those that are no part of the model, by name.
    """

    def __init__(self, path: str, family: ModelFamily, known: Collection[str]) -> None:
        """Find out which file has which weight.

        Args:
            path: Folder or hub id.
            family: Family of the model.
            known: Names of the model's parameters, by which they are asked for.

        Raises:
            ValueError: There are no safetensors files.
        """
        self._files: dict[str, tuple[Path, str]] = {}
        self.kept: dict[str, int] = {}
        for file in sorted(weights_folder(path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    self._files[family.module_name(stored, known)] = file, stored
                    if family.keeps(stored):
                        self.kept[stored] = _bytes_of(tensors, stored)

    def shape(self, name: str) -> list[int]:
        """Return the shape of a weight, of which nothing else is read."""
        file, stored = self._files[name]
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.get_slice(stored).get_shape())

    def stored_name(self, name: str) -> str:
        """Return what a weight is called in the files."""
        return self._files[name][1]

    def read(self, name: str) -> torch.Tensor:
        """Return a weight in the type that it is stored in."""
        file, stored = self._files[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(stored)


def _bytes_of(tensors: Any, name: str) -> int:
    """Bytes of a tensor of an open file, by its shape and the bits in the name of its type, such as `BF16`."""
    described = tensors.get_slice(name)
    bits = int(re.search(r"\d+", described.get_dtype())[0])
    return math.prod(described.get_shape()) * bits // 8

"""The small files of a base model that its export keeps: what loads the one, loads the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

# By name, because the hub's cache holds of a model only what was asked for.
_OF_THE_MODEL = (
    *(CONFIG_NAME, GENERATION_CONFIG_NAME, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
    "spk_dict.pt",  # the voices that Qwen2.5-Omni speaks with
)
_OF_THE_PROCESSOR = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE),
    *(IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME),
)
# What says that there are weights beside them.
OF_WEIGHTS = frozenset({CONFIG_NAME, GENERATION_CONFIG_NAME})
# Before transformers 4.56 the type of the weights was `torch_dtype`; either is still read.
_DTYPE_KEYS = ("dtype", "torch_dtype")


def find_base_files(model: str, processor: str) -> dict[str, Path]:
    """Find the files that are neither weights nor code, fetched from the hub where need be.

    Args:
        model: Folder or hub id of the model.
        processor: The same of its processor, with tokenizer and chat template.

    Returns:
        The files that there are, by name.
    """
    sought = [(name, model) for name in _OF_THE_MODEL] + [(name, processor) for name in _OF_THE_PROCESSOR]
    found = {name: cached_file(where, name, _raise_exceptions_for_missing_entries=False) for name, where in sought}
    return {name: Path(path) for name, path in found.items() if path}


def with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """Return a `config.json` that names the type of the exported weights, spelt as it was; else unchanged.

    Args:
        config: The base model's own.
        dtype: Type of the weights.
    """
    name, values = str(dtype).removeprefix("torch."), json.loads(config)
    places = [(part, key) for part in _parts(values) for key in _DTYPE_KEYS if part.get(key)]
    if not places:
        key = "torch_dtype" if str(values.get("transformers_version", "5")).startswith("4.") else "dtype"
        places = [(values, key)]
    if all(part.get(key) == name for part, key in places):
        return config
    for part, key in places:
        part[key] = name
    return to_json(values)


def to_json(values: dict[str, Any]) -> bytes:
    """Return the text of a configuration file, in the form that transformers writes."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a configuration and all within it."""
    yield values
    for value in values.values():
        if isinstance(value, dict):
            yield from _parts(value)

"""What is said when parameters are wrong: every key, with the file that it is from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qvl_pipeline.config import BLOCKS, Block
from qvl_pipeline.errors import UserError, did_you_mean

Key = tuple[str | int, ...]


def check_parameters(parameters: dict[str, Any], runtime: dict[str, Any], folders: list[Path]) -> dict[str, Block]:
    """Return every block validated, with its defaults filled in.

    Args:
        parameters: The merged parameters.
        runtime: Those of them given on the command line, by `--params`.
        folders: Configuration folders, the one that takes precedence first; only read to say where a value comes from.

    Raises:
        UserError: A block or a key is unknown, missing, or has a value that is not allowed. All of them are listed.
    """
    problems: list[tuple[Key, str]] = [((name,), _unknown(name)) for name in parameters if name not in BLOCKS]
    blocks = {}
    for name, model in BLOCKS.items():
        try:
            blocks[name] = model.model_validate(parameters.get(name) or {})
        except ValidationError as error:
            problems += _by_key(name, parameters, error).items()
    if problems:
        lines = [f"{'.'.join(map(str, key))}: {text} ({_origin(key, runtime, folders)})" for key, text in problems]
        raise UserError("\n".join(["the parameters cannot be used:", *(f"  {line}" for line in lines)]))
    return blocks


def _unknown(name: str) -> str:
    return "unknown block: " + did_you_mean(name, BLOCKS, f"known blocks: {', '.join(BLOCKS)}")


def _by_key(block: str, parameters: dict[str, Any], error: ValidationError) -> dict[Key, str]:
    """Return what is wrong for every key; the alternatives of a union are joined into one text."""
    texts: dict[Key, list[str]] = {}
    for problem in error.errors(include_url=False, include_context=False):
        key = tuple(_real_keys((block, *problem["loc"]), parameters))
        text = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        if key[1:] and problem["type"] != "missing" and not isinstance(given, dict):
            text += f", got {given!r}"
        texts.setdefault(key, []).append(text)
    return {key: "; or ".join(alternatives) for key, alternatives in texts.items()}


def _real_keys(location: Key, parameters: Any) -> Iterator[str | int]:
    """Yield the keys of pydantic's `location`, without the names of union members that it appends."""
    for key in location:
        if not isinstance(parameters, dict | list):
            return
        yield key
        found = key in parameters if isinstance(parameters, dict) else isinstance(key, int)
        parameters = parameters[key] if found else None


def _origin(key: Key, runtime: dict[str, Any], folders: list[Path]) -> str:
    """Return where the value of `key` is set, else where its block is."""
    for length in range(len(key), 0, -1):
        if _has(runtime, key[:length]):
            return "--params"
        for path in (path for folder in folders for path in sorted(folder.glob("**/parameters*.yml"))):
            if _has(yaml.safe_load(path.read_text(encoding="utf-8")), key[:length]):
                return "/".join(path.parts[-3:])
    return f"add it to a parameters file in {' or '.join('/'.join(folder.parts[-2:]) for folder in folders)}"


def _has(values: Any, key: Key) -> bool:
    for part in key:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if not inside:
            return False
        values = values[part]
    return True

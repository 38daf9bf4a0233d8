"""What is said when parameters are wrong: every key, with the file that it is from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from qvl_pipeline.config import BLOCKS, Block
from qvl_pipeline.config.across import find_conflicts
from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.profiles.origins import Key, Origins


def check_parameters(parameters: dict[str, Any], origins: Origins) -> dict[str, Block]:
    """Return every block validated, with its defaults filled in.

    Args:
        parameters: The merged parameters.
        origins: Where they come from, to say it of a wrong one.

    Raises:
        UserError: A block or a key is unknown, missing, or has a value that is not allowed; or values do not fit
            together. All of them are listed.
    """
    problems: list[tuple[Key, str]] = [((name,), _unknown(name)) for name in parameters if name not in BLOCKS]
    blocks = {}
    for name, model in BLOCKS.items():
        try:
            given = parameters.get(name)
            blocks[name] = model.model_validate({} if given is None else given)
        except ValidationError as error:
            problems += _by_key(name, parameters, error).items()
    if not problems:
        problems = list(find_conflicts(blocks))
    if problems:
        lines = [f"{'.'.join(map(str, key))}: {text} ({origins.nearest(key)})" for key, text in problems]
        raise UserError("\n".join(["the parameters cannot be used:", *(f"  {line}" for line in lines)]))
    return blocks


def _unknown(name: str) -> str:
    return "unknown block: " + did_you_mean(name, BLOCKS, f"known blocks: {', '.join(BLOCKS)}")


def _by_key(block: str, parameters: dict[str, Any], error: ValidationError) -> dict[Key, str]:
    """Return what is wrong for every key; the alternatives of a union are joined into one text."""
    texts: dict[Key, list[str]] = {}
    for problem in error.errors(include_url=False, include_context=False):
        if problem["type"] == "default_factory_not_called":  # for want of another key, which is listed itself
            continue
        key = tuple(_real_keys((block, *problem["loc"]), parameters))
        text = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        if key[1:] and problem["type"] != "missing" and not isinstance(given, dict):
            text += f", got {given!r}"
        texts.setdefault(key, []).append(_with_its_block(block, text))
    return {key: "; or ".join(alternatives) for key, alternatives in texts.items()}


def _with_its_block(block: str, text: str) -> str:
    """Of a key that is unknown in one block, and known in another: say so, and not which one looks like it."""
    if not (named := re.match(r"unknown key '(\w+)': ", text)):
        return text
    others = [name for name, model in BLOCKS.items() if name != block and named[1] in model.model_fields]
    return f"{named[0]}write it as {' or '.join(f'{name}.{named[1]}' for name in others)}" if others else text


def _real_keys(location: Key, parameters: Any) -> Iterator[str | int]:
    """Yield the keys of pydantic's `location`, without the names of union members that it appends."""
    for key in location:
        if not isinstance(parameters, dict | list):
            return
        yield key
        found = key in parameters if isinstance(parameters, dict) else isinstance(key, int)
        parameters = parameters[key] if found else None

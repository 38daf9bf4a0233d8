"""What is said when parameters are wrong: every key, with the file that it is from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from qvl_pipeline.config import BLOCKS, Block
from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.profiles.origins import Key, Origins


def check_parameters(parameters: dict[str, Any], origins: Origins) -> dict[str, Block]:
    """Return every block validated, with its defaults filled in.

    Args:
        parameters: The merged parameters.
        origins: Where they come from, to say it of a wrong one.

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
    problems += [] if problems else list(_do_not_hear(blocks))
    if problems:
        lines = [f"{'.'.join(map(str, key))}: {text} ({origins.nearest(key)})" for key, text in problems]
        raise UserError("\n".join(["the parameters cannot be used:", *(f"  {line}" for line in lines)]))
    return blocks


def _do_not_hear(blocks: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """Yield the keys that ask a model to hear which does not."""
    if blocks["model"].family.hearing:
        return
    hearing = " or ".join(name for name, family in FAMILIES.items() if family.hearing)
    remedy = f"model.processor_type {blocks['model'].processor_type} does not hear, use {hearing}"
    if blocks["batching"].dataset_type == "vision_audio":
        yield ("batching", "dataset_type"), f"vision_audio is for models that hear: {remedy}, or vision"
    if blocks["sample"].use_audio_in_video:
        yield ("sample", "use_audio_in_video"), f"it is for models that hear: {remedy}, or drop it"


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

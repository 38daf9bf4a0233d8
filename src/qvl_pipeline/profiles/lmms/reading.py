"""The forms that a configuration of LMMS Engine has: a list of one trainer, flat, or with `trainer_args`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.profiles.lmms.keys import DATASET, FSDP, MODEL, PROCESSOR, TOP, TRAINER
from qvl_pipeline.profiles.lmms.rules import Rule

# The parts of a file, and which keys each has.
PARTS: dict[str, dict[str, Rule]] = {
    "trainer_args": TRAINER,
    "dataset_config": DATASET,
    "processor_config": PROCESSOR,
    "model_config": MODEL,
    "fsdp_config": FSDP,
}
# What a processor takes in a part of its own.
_OF_THE_PROCESSOR = "extra_kwargs"


@dataclass(frozen=True)
class Entry:
    """A key of a file.

    Attributes:
        path: Where it stands, as `dataset_config.packing`.
        name: The key itself.
        value: Its value.
        rule: What becomes of it.
    """

    path: str
    name: str
    value: Any
    rule: Rule


def read_entries(file: Path) -> dict[str, Entry]:
    """Read all keys of a configuration, in the order of the file; values of `null` say nothing.

    Args:
        file: YAML in any of the three forms.

    Returns:
        The entries by their names.

    Raises:
        UserError: It is no such file, a key is unknown, or one is there twice.
    """
    found: dict[str, Entry] = {}
    for entry in _entries(_one_trainer(file, _load(file)), file):
        if entry.value is None:
            continue
        if entry.name in found and found[entry.name].value != entry.value:
            raise UserError(
                f"{file}: {found[entry.name].path} and {entry.path} say different things: keep the one that is meant"
            )
        found[entry.name] = entry
    return found


def _load(file: Path) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    except YAMLError as error:  # also of a key that is there twice
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{file}{where} cannot be read as YAML: {' '.join(problem.split())}") from error


def _one_trainer(file: Path, content: Any) -> Mapping[str, Any]:
    if isinstance(content, list):
        if len(content) != 1:
            raise UserError(f"{file} is a list of {len(content)} configurations: a profile is one, so give each a file")
        content = content[0]
        if not isinstance(content, dict) or set(content) != {"type", "config"} or content["type"] != "trainer":
            raise UserError(f"{file} is a list, whose entry must be `type: trainer` with its `config`")
        content = content["config"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} is no configuration of LMMS Engine: it has no keys such as dataset_config")
    return content


def _entries(values: Mapping[str, Any], file: Path, part: str = "", path: str = "") -> Iterator[Entry]:
    for key, value in values.items():
        place = f"{path}{key}"
        if key in PARTS:
            yield from _entries(_mapping(value, place, file), file, key, f"{place}.")
        elif part == "processor_config" and key == _OF_THE_PROCESSOR:
            yield from _entries(_mapping(value, place, file), file, part, f"{place}.")
        elif (rule := _rule(key, part)) is not None:
            yield Entry(place, key, value, rule)
        else:
            raise UserError(f"{file}: {place} is no key of LMMS Engine{_hint(key, part)}")


def _mapping(value: Any, place: str, file: Path) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{file}: {place} must have keys of its own, but is {value!r}")
    return value or {}


def _rule(key: str, part: str) -> Rule | None:
    """Return the rule of a key. At the top, in the flat form, keys of all parts may stand."""
    if part:
        return PARTS[part].get(key)
    return next((rules[key] for rules in (TOP, *PARTS.values()) if key in rules), None)


def _hint(key: str, part: str) -> str:
    elsewhere = [name for name, rules in PARTS.items() if key in rules]
    if elsewhere:
        return f" in {part}: it belongs into {elsewhere[0]}"
    known = PARTS[part] if part else {name: None for rules in (TOP, *PARTS.values()) for name in rules}
    hint = did_you_mean(key, known, "take it out, or write it into the profile under the name that it has here")
    return f": {hint}"

"""A profile from a configuration of LMMS Engine: two files, in which every key of it is found again."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.errors import UserError
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.lmms.mapping import Mapped, map_entries
from qvl_pipeline.profiles.lmms.reading import read_entries
from qvl_pipeline.profiles.loader import BASE
from qvl_pipeline.profiles.new import GLOBALS, PARAMETERS, check_name
from qvl_pipeline.profiles.origins import Origins

# Blocks of conf/base that every profile may change; the others are given on the command line.
_BLOCKS = ("ingest", "validate", "sample", "model", "batching", "train", "adapter", "evaluate")
_SCHEMA = "# yaml-language-server: $schema=../parameters.schema.json\n"


def import_profile(
    project: Path, file: Path, name: str, *, data_parallel_size: int, say: Callable[[str], None]
) -> None:
    """Write the profile of a configuration.

    Args:
        project: Root of the project.
        file: The configuration.
        name: Name of the profile, and of its dataset.
        data_parallel_size: Data-parallel ranks that the global batch is declared for: LMMS Engine has as many as
            processes are started, over `sp_ulysses_degree`.
        say: Is called with each line that is to be shown.

    Raises:
        UserError: A key of it cannot be kept to, the parameters do not fit together, or there is such a profile, other
            than what this would write. Nothing is written then.
    """
    conf = project / "conf"
    mapped = map_entries(read_entries(file), file)
    mapped.set(
        "batching.data_parallel_size", data_parallel_size, "GPUs that the file is started on, over sp_ulysses_degree"
    )
    files = {GLOBALS: _globals(file, name), PARAMETERS: _parameters(mapped, file)}
    if (conf / name).is_dir() and _is_the_same(conf / name, files):
        say(f"conf/{name} is what {file} says")
        return
    check_name(conf, name)
    with contextlib.ExitStack() as undo:
        (conf / name).mkdir()
        undo.callback(shutil.rmtree, conf / name)
        for path, text in files.items():
            (conf / name / path).write_text(text, encoding="utf-8")
        try:
            _check(conf, name)
        except UserError as error:
            raise UserError(f"{file} cannot become a profile: {error}") from error
        undo.pop_all()
    for path, value, reason in mapped.notes:
        say(f"  {path}: {value}: {reason}")
    say(f"conf/{name} is made from {file}. Next: kedro run --env {name}")


def _is_the_same(folder: Path, files: dict[str, str]) -> bool:
    return all((folder / path).is_file() and (folder / path).read_text("utf-8") == text for path, text in files.items())


def _check(conf: Path, name: str) -> None:
    """Refuse parameters that no run could use, as it would, before there is a profile with them."""
    merged: dict[str, Any] = {}
    for folder in (conf / BASE, conf / name):
        blocks = yaml.safe_load((folder / PARAMETERS).read_text(encoding="utf-8"))
        for block, values in blocks.items():
            merged[block] = _merged(merged.get(block) or {}, values or {})
    check_parameters(
        {block: merged[block] for block in BLOCKS if block in merged}, Origins({}, [conf / name, conf / BASE])
    )


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(under[key], value) for key, value in over.items() if isinstance(under.get(key), dict)}
    return {**under, **over, **both}


def _globals(file: Path, name: str) -> str:
    return f"# Made by `kedro guide import {file} --name {name}`.\nprofile: {name}\ndataset: {name}\n"


def _parameters(mapped: Mapped, file: Path) -> str:
    head = [
        f"# From {file.name}, a configuration of LMMS Engine. Behind a value is its key there, where that is another."
    ]
    if mapped.notes:
        head += ["# Of its keys, these decide nothing here:"]
        head += [f"#   {path}: {_line(value)}: {reason}" for path, value, reason in mapped.notes]
    lines = [*head, *(line for block in BLOCKS if block in _BLOCKS for line in _block(block, mapped))]
    return _SCHEMA + "\n".join(lines) + "\n"


def _block(block: str, mapped: Mapped) -> Iterator[str]:
    values = mapped.values.get(block, {})
    if not values:
        yield f"{block}: {{}}"
        return
    yield f"{block}:"
    for key in (key for key in BLOCKS[block].model_fields if key in values):
        value, names = values[key], [name for name in mapped.comments if f"{name}.".startswith(f"{block}.{key}.")]
        comment = "; ".join(filter(None, (mapped.comments[name] for name in names)))
        behind = f"  # {comment}" if comment else ""
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"  {key}:{behind}"
            yield from (f"    - {_line(item)}" for item in value)
        else:
            yield f"  {key}: {_line(value)}{behind}"


def _line(value: Any) -> str:
    # Kedro's YAML is 1.1, as PyYAML's: `no` must be quoted, and 1e-6 is no number.
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")

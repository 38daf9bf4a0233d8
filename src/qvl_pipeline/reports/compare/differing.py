"""Parameters that differ between trainings, so that a person sees at once what was changed.

A source has a dozen parameters, and twenty sources that one training has and another has not are one change. So sources
are one row each, and what is its default where it is known at all is folded.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import pandas as pd
from pydantic_core import to_jsonable_python

from qvl_pipeline.config import BLOCKS, DatasetSource
from qvl_pipeline.reports.compare.tables import NOT_SET

Row = tuple[str, list[str]]

_KEYS = DatasetSource.model_fields
_SOURCE = re.compile(rf"ingest\.datasets\.(?P<source>.+?)\.(?P<key>(?:{'|'.join(_KEYS)})(?:\..+)?)")
# What is looked for first; blocks that are not named here come after these.
_ORDER = ("train", "adapter", "model", "sample", "batching", "ingest", "validate", "evaluate")
# Of a source that a training has not, what is no matter of taste in the other.
_GIVEN = ("name", "data_folder", "data_type")
ABSENT, PRESENT = "\N{EN DASH}", "as by default"


class Differing(NamedTuple):
    """Rows of a name and one text a training.

    Attributes:
        changed: What somebody changed.
        sources: Sources that differ, with those of their parameters that do.
        defaults: Parameters that have their default wherever they are known.
    """

    changed: list[Row]
    sources: list[Row]
    defaults: list[Row]


def grouped(parameters: pd.DataFrame) -> Differing:
    """Group the parameters that differ.

    Args:
        parameters: Text by the flat name of the parameter, one column a training.
    """
    of_source = {name: match for name in parameters.index if (match := _SOURCE.fullmatch(name))}
    others = parameters[~parameters.index.isin(of_source)]
    others = others.loc[sorted(others.index, key=_place)]
    folded = [_is_default(name, list(row)) for name, *row in others.itertuples(name=None)]
    tables: dict[str, dict[str, list[str]]] = {}
    for name, match in of_source.items():
        tables.setdefault(match["source"], {})[match["key"]] = parameters.loc[name].tolist()
    return Differing(
        changed=rows_by_name(others[[not is_default for is_default in folded]]),
        sources=[(source, _of_source(table, parameters.shape[1])) for source, table in sorted(tables.items())],
        defaults=rows_by_name(others[folded]),
    )


def _place(name: str) -> tuple[int, str]:
    block = name.partition(".")[0]
    return _ORDER.index(block) if block in _ORDER else len(_ORDER), name


def rows_by_name(table: pd.DataFrame) -> list[Row]:
    """Return a table by the names in its index."""
    return [(name, values) for name, *values in table.itertuples(name=None)]


def _is_default(name: str, values: list[str]) -> bool:
    block, _, key = name.partition(".")
    field = BLOCKS[block].model_fields.get(key) if block in BLOCKS else None
    if field is None or field.is_required() or field.default_factory is not None:
        return False
    return set(values) <= {NOT_SET, _text(field.default)}


def _of_source(table: dict[str, list[str]], runs: int) -> list[str]:
    """Say of each training what of a source differs; where another has not the source, what is not its default."""
    known = [any(values[run] != NOT_SET for values in table.values()) for run in range(runs)]
    shown = []
    for run in range(runs):
        said = [
            f"{key} {values[run]}"
            for key, values in table.items()
            if values[run] != NOT_SET and (all(known) or (key not in _GIVEN and values[run] != _default(key)))
        ]
        shown.append(", ".join(said) or PRESENT if known[run] else ABSENT)
    return shown


def _default(key: str) -> str | None:
    field = _KEYS.get(key)
    return _text(field.get_default(call_default_factory=True)) if field and not field.is_required() else None


def _text(value: object) -> str:
    plain = to_jsonable_python(value)
    return plain if isinstance(plain, str) else json.dumps(plain)

"""The parameters that a hand-over was made with: written into it, and compared with those of the run that reads it.

A stage reads the parameters of its own. What it takes in has the record of the stages before it, which it hands on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_pipeline.config.base import Block
from qvl_pipeline.storage.digests import read_sealed, sealed
from qvl_pipeline.storage.tables import ATTRS

# The entries that hold a record, and the blocks that are in it.
RECORDED = {
    "samples": ("ingest",),
    "valid_samples": ("ingest", "validate"),
    "sampled_samples": ("ingest", "validate", "sample", "model"),
    "video_frames": ("ingest", "validate", "sample", "model"),
    "tokenized_samples": ("ingest", "validate", "sample", "model"),
}
RECORD_FILE = "made_with.json"

Attrs = dict[str, Any]  # of a data frame
Record = dict[str, dict[str, Any]]  # parameters by block


def made_with(before: Attrs, **blocks: Block) -> Attrs:
    """Add the parameters of a stage to the record of its input.

    Args:
        before: Attributes of the input.
        **blocks: The blocks of the stage.

    Returns:
        Attributes of the output: the record is under `made_with`.
    """
    own = {name: block.decisive("frames") for name, block in blocks.items()}
    return {"made_with": before.get("made_with", {}) | own}


def with_attrs(schema: pa.Schema, attrs: Attrs) -> pa.Schema:
    """Return the schema of a file that keeps attributes."""
    return schema.with_metadata({ATTRS: json.dumps(attrs, sort_keys=True)})


def attrs_of(schema: pa.Schema) -> Attrs:
    """Return the attributes that a file with this schema keeps."""
    return json.loads((schema.metadata or {}).get(ATTRS, b"{}"))


def write_record(folder: Path, attrs: Attrs) -> None:
    """Write the record into a folder."""
    text = json.dumps(sealed(attrs["made_with"]), sort_keys=True, indent=2)
    (folder / RECORD_FILE).write_text(f"{text}\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """Read the record out of a Parquet file, an Arrow IPC file, or a folder; an empty one where there is none."""
    if path.is_dir():
        file = path / RECORD_FILE
        return read_sealed(file) if file.exists() else {}
    if path.suffix == ".parquet":
        return attrs_of(pq.read_schema(path)).get("made_with", {})
    with pa.memory_map(str(path)) as file:
        return attrs_of(pa.ipc.open_file(file).schema).get("made_with", {})


def first_difference(recorded: Record, declared: Record) -> str | None:
    """Say in which parameter a record differs from what is declared.

    Args:
        recorded: Record of a hand-over.
        declared: Decisive parameters of the blocks that it was made with.

    Returns:
        What is wrong and what to do, a half-sentence that a command follows with `by`; `None` when nothing differs.
    """
    if missing := [block for block in declared if block not in recorded]:
        return f"does not say with which parameters of '{missing[0]}' it was made: make it again"
    before, now = (dict(_leaves(blocks)) for blocks in ({block: recorded[block] for block in declared}, declared))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    if not keys:
        return None
    others = f" (and {len(keys) - 1} more differ)" if keys[1:] else ""
    found = f"was made with {keys[0]} = {before.get(keys[0])!r}, but this run has {now.get(keys[0])!r}{others}"
    return f"{found}: give this run the former, or make it again"


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is inside of nested values by its dotted key; an empty list or mapping is a value itself."""
    if not isinstance(values, dict | list) or not values:
        yield key, values
        return
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield from _leaves(value, f"{key}.{name}" if key else str(name))

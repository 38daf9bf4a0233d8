"""Whether a hand-over between stages is what was written: looked at before a run starts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from qvl_pipeline.storage.batches import CheckedBatches
from qvl_pipeline.storage.digests import DamagedError, damage_in, read_sealed
from qvl_pipeline.storage.tables import damage_named, open_table, read_table

# Of what is larger, only the structure is looked at: its content is checked piece by piece when it is first read.
READ_AT_ONCE_BYTES = 1 << 28


def damage(path: Path, schema: pa.Schema | None = None) -> str | None:
    """Say what is wrong with a file, or with one in a folder; nothing when it is sound or of a kind without digests.

    Args:
        path: A table (`.parquet`, `.arrow`), a JSON file, or a folder of such files and weights.
        schema: The columns that a table must have.
    """
    try:
        if path.is_dir():
            return damage_in(path) or _damage_of_files(path)
        _check(path, schema)
    except DamagedError as error:
        return str(error)
    return None


def _damage_of_files(folder: Path) -> str | None:
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" and (wrong := torn_weights(file)):
            return wrong
        if file.suffix != ".safetensors" and file.is_file():
            _check(file)
    return None


def _check(file: Path, schema: pa.Schema | None = None) -> None:
    small = file.stat().st_size <= READ_AT_ONCE_BYTES
    if file.suffix == ".parquet" and small:
        read_table(file, schema)
    elif file.suffix == ".parquet":
        with damage_named(file):
            open_table(file).close()
    elif file.suffix == ".arrow":
        batches = CheckedBatches(file)
        if small:
            batches.check()
    elif file.suffix == ".json":
        read_sealed(file)


def torn_weights(file: Path) -> str | None:
    """Say whether a safetensors file is shorter or longer than its header says; the header is all that is read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > size - 8:
            return f"{file} is cut off"
        try:
            header = json.loads(opened.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{file} is damaged (it has no header of a safetensors file)"
    return None if size == 8 + length + end else f"{file} has {size} bytes, and its header says {8 + length + end}"

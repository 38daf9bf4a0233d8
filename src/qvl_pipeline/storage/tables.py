"""Parquet files that have a digest of themselves, and errors that name a file which is not what was written.

Parquet's own checksums cover the pages, which a reader of a part can check; what lies between them (types, sizes,
places, counts) they do not. So the file's metadata has one more entry: the digest of all of the file, computed while
the entry's own value is blank.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_pipeline.storage.digests import Piece, agrees, damaged, digest_of, file_parts

# How pandas keeps `DataFrame.attrs` in Parquet, and so the catalog's tables do: as JSON.
ATTRS = b"PANDAS_ATTRS"


# The entry with the digest, in the file's metadata; its value has this many characters, whichever digest it is.
_SEAL = b"qvl_digest"
_SEAL_BYTES = 24
# What other entries there may be; a file without digest that has an unknown one had its digest damaged.
_ENTRIES = {ATTRS, b"ARROW:schema", b"pandas"}


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table, with its digest, and a checksum for every page."""
    with table_writer(path, table.schema) as writer:
        writer.write_table(table)


def table_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a file to write row groups to, with a checksum for every page, and its digest once it is closed."""
    return _SealingWriter(path, schema)


class _SealingWriter(pq.ParquetWriter):
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        super().__init__(path, schema, write_page_checksum=True)

    def close(self) -> None:
        if not self.is_open:
            return
        try:
            self.add_key_value_metadata({_SEAL: b" " * _SEAL_BYTES})
            super().close()
        finally:
            self.is_open = False  # else the destructor would try it again, and print what comes of it
        place = _seal_in(self._path)
        assert place is not None, "the entry that was just written"
        with self._path.open("r+b") as file:
            file.seek(place)
            file.write(digest_of(file_parts(self._path)).encode().ljust(_SEAL_BYTES))


def _seal_in(path: Path) -> int | None:
    # Where the value of the entry is. Between it and its key, Thrift's compact form has two bytes: type and length.
    with path.open("rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(file.read(4), "little")
        start = max(size - 8 - length, 0)
        file.seek(start)
        found = file.read(length).rfind(_SEAL)
    return None if found < 0 else start + found + len(_SEAL) + 2


def _check_seal(path: Path, metadata: pq.FileMetaData) -> None:
    place = _seal_in(path)
    if place is None:
        # Written by an earlier version or another program, or its entry is what was damaged.
        if not metadata.created_by or not set(metadata.metadata or {}) <= _ENTRIES:
            raise ValueError("it has lost its digest")
        return
    with path.open("rb") as file:
        file.seek(place)
        recorded = file.read(_SEAL_BYTES)
    if not agrees(recorded.decode("ascii", "replace").rstrip(), _without(path, place)):
        raise ValueError("it is not what was written")


def _without(path: Path, place: int) -> Iterator[Piece]:
    # The parts of a file, the value of its entry blank.
    at = 0
    for part in file_parts(path):
        blank = slice(max(place - at, 0), max(place + _SEAL_BYTES - at, 0))
        part[blank] = b" " * len(part[blank])
        at += len(part)
        yield part


def open_table(path: Path, *, memory_map: bool = False) -> pq.ParquetFile:
    """Open a file whose pages are checked as they are read, as far as they have checksums."""
    return _CheckedFile(path, memory_map=memory_map, pre_buffer=False, page_checksum_verification=True)


class _CheckedFile(pq.ParquetFile):
    def __init__(self, path: Path, **options: Any) -> None:
        self._path = path
        super().__init__(path, **options)

    def iter_batches(self, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        with damage_named(self._path, "make it again, by the pipeline that writes it"):
            yield from super().iter_batches(*args, **options)


def read_table(path: Path, schema: pa.Schema | None = None, *, advice: str = "") -> pa.Table:
    """Read a file, and check all of it.

    Not `pyarrow.parquet.read_table`, which imports pandas where it is installed: training processes do without.

    Args:
        path: The file.
        schema: The columns that it must have; metadata apart.
        advice: What to do when it is damaged.

    Raises:
        DamagedError: It is not what was written.
    """
    with damage_named(path, advice), open_table(path) as file:
        _check_seal(path, file.metadata)
        table = file.read()
        table = table.replace_schema_metadata({k: v for k, v in (table.schema.metadata or {}).items() if k != _SEAL})
        attrs = [(found.metadata or {}).get(ATTRS, b"{}") for found in (table.schema, file.schema_arrow)]
        if attrs[0] != attrs[1] or not isinstance(json.loads(attrs[0]), dict):
            raise ValueError(f"its {ATTRS.decode()} contradict each other")
    if schema is not None and not table.schema.equals(schema):
        raise damaged(path, f"its columns are {', '.join(table.schema.names)}", advice)
    return table


@contextlib.contextmanager
def damage_named(path: Path, advice: str = "") -> Iterator[None]:
    """Turn what Arrow raises for a file that is damaged into one sentence, within which a missing file stays missing.

    Raises:
        DamagedError: Names the file.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, " ".join(str(error).split()), advice) from error

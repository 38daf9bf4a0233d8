"""Parquet files whose pages have checksums, and errors that name a file which is not what was written.

The checksums cover the rows. Of what lies between them (types, sizes, places) every change either ends in an error of
the reader or shows in the schema, which whoever knows it compares.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_pipeline.storage.digests import damaged

# How pandas keeps `DataFrame.attrs` in Parquet, and so the catalog's tables do: as JSON.
ATTRS = b"PANDAS_ATTRS"


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table, with a checksum for every page."""
    pq.write_table(table, path, write_page_checksum=True)


def table_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a file to write row groups to, with a checksum for every page."""
    return pq.ParquetWriter(path, schema, write_page_checksum=True)


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
        table = file.read()
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

"""Reading files of rows in slabs: in order, each row by itself, in memory that does not depend on the file's length."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow as pa

from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.table_worker import TableReader
from qvl_pipeline.data.sources.files.tables import Piece
from qvl_pipeline.data.sources.files.texts import TEXTS
from qvl_pipeline.errors import UserError


class Slab(NamedTuple):
    """Rows that follow one another in a file.

    Attributes:
        rows: Columns `record`, the JSON of a row as bytes and as yet unparsed, or a struct of its columns, or of a
            sample of a shard with its members; and `problem`, which says why a row could not be taken out of its file,
            else null.
        done: Share of the file that is read with this slab, in (0, 1].
    """

    rows: pa.Table
    done: float


class RowFiles:
    """Reads files of rows: texts here, tables in a process that is there until the end of the context."""

    def __init__(self, limits: Limits) -> None:
        """Set up the reader.

        Args:
            limits: How large slabs and rows may be.
        """
        self._limits = limits
        self._tables = TableReader(limits)

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process that reads tables."""
        self._tables.__exit__()

    def slabs(self, path: Path, data_type: str) -> Iterator[Slab]:
        """Read all rows of a file.

        Args:
            path: File to read.
            data_type: `parquet`, `arrow`, `hf_dataset` (a file of it), `webdataset` (a shard), `csv`, `json` (a list of
                rows) or `jsonl` (a row a line). The last four may be compressed with gzip or zstd, whatever their name.

        Yields:
            Slabs in the order of the file; none of them is empty.

        Raises:
            UserError: The file as a whole cannot be read, or not to its end.
        """
        read = TEXTS[data_type](path, self._limits) if data_type in TEXTS else self._tables.read(path, data_type)
        try:
            with closing(read) as pieces:
                yield from _slabs(pieces, self._limits.slab_bytes)
        except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError) as error:
            raise UserError(f"'{path}' cannot be read as {data_type}: {' '.join(str(error).split())}") from error


def _slabs(pieces: Iterable[Piece], slab_bytes: int) -> Iterator[Slab]:
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        if held and held[0].records.type != piece.records.type:
            yield _join(held)
            size = 0
        held.append(piece)
        size += piece.records.nbytes
        if size >= slab_bytes:
            yield _join(held)
            size = 0
    if held:
        yield _join(held)


def _join(pieces: list[Piece]) -> Slab:
    """Make a slab of pieces and let go of them: how long its rows are in memory is up to the caller."""
    records = pa.chunked_array([piece.records for piece in pieces])
    problems = pa.chunked_array(
        [pa.array(piece.problems or [None] * len(piece.records), pa.string()) for piece in pieces]
    )
    done = pieces[-1].done
    pieces.clear()
    return Slab(pa.table({"record": records, "problem": problems}), done)

"""Tables that are larger than memory: read batch by batch, written in row groups of a fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_pipeline.storage.tables import table_writer

ROW_GROUP_ROWS = 8192


def read_batches(table: pq.ParquetFile, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Read some columns of a table, in order.

    Args:
        table: The table.
        columns: Which.
        batch_rows: Most rows of a batch.

    Yields:
        Batches. Nothing is read ahead, as `pyarrow.dataset` does, by so much that all of a table may be in memory.
    """
    yield from table.iter_batches(batch_rows, columns=columns, use_threads=False)


class TableWriter:
    """Writes Parquet in row groups of a fixed size, whatever the pieces that it gets."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Start a file.

        Args:
            path: File to write.
            schema: Its columns.
        """
        self._file = table_writer(path, schema)
        self._held = schema.empty_table()

    def __enter__(self) -> TableWriter:
        """Enter the context, at whose end the file is complete."""
        return self

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self._held = pa.concat_tables([self._held, table])
        while self._held.num_rows >= ROW_GROUP_ROWS:
            self._write_group(self._held.slice(0, ROW_GROUP_ROWS))
            self._held = self._held.slice(ROW_GROUP_ROWS)
        # Copied, because a slice keeps all that it was cut from in memory.
        self._held = self._held.take(pa.array(range(self._held.num_rows), pa.int64()))

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        """Write what is left, unless an error ended the work."""
        with self._file:
            if kind is None and self._held.num_rows:
                self._write_group(self._held)

    def _write_group(self, rows: pa.Table) -> None:
        # In one chunk, because Parquet ends a page where a chunk ends.
        self._file.write_table(rows.combine_chunks())

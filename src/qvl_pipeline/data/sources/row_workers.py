"""Rows of slabs to samples on all cores: in processes of this machine, or on a Ray cluster by Daft."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from typing import Any, Self

import daft
import pyarrow as pa
from daft.exceptions import DaftCoreException

from qvl_pipeline.config import DataEngineConfig, DatasetSource, IngestConfig
from qvl_pipeline.data.sources.rows import READ_ROW, RowReader
from qvl_pipeline.data.spread import clean_processes
from qvl_pipeline.errors import UserError
from qvl_pipeline.orphans import end_with_client

# Of the memory limit, what is for this process and its slabs, and what a process more takes.
_OWN_GIB, _WORKER_GIB = 1.0, 0.1


class RowWorkers:
    """Reads the rows of slabs, in pieces of `batch_rows` on all cores; rows keep their order.

    Daft's own workers are started anew for every slab, which takes longer than a slab does, and its threads share one
    interpreter, which is where the time goes. So locally it is a pool of processes, which is there for all slabs.
    """

    def __init__(self, engine: DataEngineConfig) -> None:
        """Set up; processes are started by the first slab that has work for more than one."""
        self._engine = engine
        by_memory = int((engine.memory_limit_gib - _OWN_GIB) / _WORKER_GIB + 1e-9)
        self._workers = min(len(os.sched_getaffinity(0)), by_memory)
        self._pool: ProcessPoolExecutor | None = None
        # Of this run: a reader knows the links of the folders that it has been to, as they were then.
        self._readers: dict[str, RowReader] = {}

    def __enter__(self) -> Self:
        """Return the workers."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; what nobody waits for any more is not begun."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    @property
    def ahead(self) -> int:
        """Slabs that may be worked on while the next one is read: one, where others do the work, and none here."""
        return 0 if self._pool is None else 1

    def start(
        self, source: DatasetSource, config: IngestConfig, split: str | None, rows: pa.Table, path: str
    ) -> Callable[[], pa.Table]:
        """Begin to read rows.

        Args:
            source: The source that they are of.
            config: The block that declares it.
            split: Split that their file is for, if any.
            rows: Columns `record` and `problem`; may be let go of.
            path: Their file, for errors.

        Returns:
            What waits for the table of `READ_ROW`s, and raises a `UserError` where they cannot be read.
        """
        batch_rows = self._engine.batch_rows
        starts = range(0, len(rows), batch_rows)
        if self._engine.runner == "ray":
            pieces = [_copied(rows, start, batch_rows) for start in starts]
            return lambda: by_daft(RowReader(source, config), split, pieces, batch_rows, path)
        if len(starts) == 1 or self._workers < 2:
            if source.name not in self._readers:
                self._readers[source.name] = RowReader(source, config)
            read = partial(_read, self._readers[source.name], split)
            return lambda: _joined((read(_copied(rows, start, batch_rows)) for start in starts), path)
        pool, given = self._processes(), pickle.dumps((source, config))
        with _named(path):
            futures = [pool.submit(_read_there, given, split, _packed(rows.slice(at, batch_rows))) for at in starts]
        return lambda: _joined((future.result() for future in futures), path)

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = clean_processes(self._workers, [__name__], end_with_client)
        return self._pool


def _copied(rows: pa.Table, start: int, count: int) -> pa.RecordBatch:
    # Copied: a slice is sent with all that it was cut from, and of one, Daft does not find the beginning of structs
    # inside of structs.
    numbers = pa.array(range(start, min(start + count, len(rows))), pa.int64())
    (batch,) = rows.take(numbers).combine_chunks().to_batches()
    return batch


def _packed(rows: pa.Table) -> pa.Buffer:
    """Return rows as they are sent: of a slice, nothing but its rows, which pickle would not do."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return sink.getvalue()


def _joined(pieces: Iterable[pa.RecordBatch], path: str) -> pa.Table:
    with _named(path):
        return pa.Table.from_batches(list(pieces), pa.schema(READ_ROW))


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the file whose rows cannot be read."""
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that reads '{path}' was ended from outside, most likely because memory ran out: run the "
            "pipeline 'ingest' again with a lower data_engine.batch_rows, or on a machine with more memory"
        ) from error
    except (DaftCoreException, pa.ArrowInvalid) as error:
        raise UserError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=1)  # for as long as the process, which is there for one run
def _reader(given: bytes) -> RowReader:
    return RowReader(*pickle.loads(given))


def _read_there(given: bytes, split: str | None, packed: pa.Buffer) -> pa.RecordBatch:
    (rows,) = pa.ipc.open_stream(packed).read_all().combine_chunks().to_batches()
    return _read(_reader(given), split, rows)


def _read(reader: RowReader, split: str | None, rows: pa.RecordBatch) -> pa.RecordBatch:
    records = rows.column("record")
    # Values of tables as Daft has them, which is what runs on a cluster.
    values = records if pa.types.is_binary(records.type) else daft.Series.from_arrow(records)
    return pa.RecordBatch.from_struct_array(_rows(reader, split, values, rows.column("problem")))


def _rows(reader: RowReader, split: str | None, records: Any, problems: Any) -> pa.StructArray:
    pairs = zip(records.to_pylist(), problems.to_pylist(), strict=True)
    return pa.array([reader.read(record, problem, split) for record, problem in pairs], READ_ROW)


def by_daft(reader: RowReader, split: str | None, pieces: list[pa.RecordBatch], batch_rows: int, path: str) -> pa.Table:
    """Read rows where Daft runs; the same bytes as in processes."""

    @daft.func.batch(return_dtype=daft.DataType.from_arrow_type(READ_ROW), unnest=True, batch_size=batch_rows)
    def read_rows(records: daft.Series, problems: daft.Series) -> pa.Array:
        return _rows(reader, split, records, problems)

    rows = sum(piece.num_rows for piece in pieces)
    with _named(path):
        frame = daft.from_arrow([pa.Table.from_batches([piece]) for piece in pieces])
        table = frame.select(read_rows(daft.col("record"), daft.col("problem"))).to_arrow()
    if table.num_rows != rows:
        raise RuntimeError(f"only {table.num_rows} of {rows} rows of '{path}' were read: Daft was interrupted")
    return table.cast(pa.schema(READ_ROW))

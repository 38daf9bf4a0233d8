"""Reading tables of Parquet and Arrow in small pieces, each of which is valid, and no larger than it may be.

What is read here may be anybody's: it runs in a process that may die (`table_worker.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.sizes import decoded_bytes, plain

_PIECE_ROWS = 1024
_NOT_UTF8 = "it holds a text that is not UTF-8"


class Piece(NamedTuple):
    """Rows that follow one another.

    Attributes:
        records: JSON of each row as bytes, or a struct of its columns.
        problems: Why a row could not be taken out of its file, else `None`; `None` instead of a list: there are none.
        done: Share of the file that is read with this piece.
    """

    records: pa.Array
    problems: list[str | None] | None
    done: float


def read_table(path: Path, data_type: str, limits: Limits) -> Iterator[Piece]:
    """Read all rows of a table.

    Args:
        path: File to read.
        data_type: `parquet`, or `arrow` (file or stream).
        limits: How large pieces and rows may be.

    Yields:
        Pieces in the order of the file.

    Raises:
        ValueError: The file is damaged, or holds more than it may.
        MemoryError: A part of it cannot be decoded in the memory that there is.
    """
    read: Callable[[Path, Limits], Iterator[tuple[pa.RecordBatch, float]]]
    read = _parquet_batches if data_type == "parquet" else _arrow_batches
    guard = limits.guard(path)
    for batch, done in read(path, limits):
        if len(set(batch.schema.names)) < len(batch.schema.names):
            raise ValueError("its columns are ambiguous: two have the same name")
        _check_structure(batch)
        guard.add(sum(map(decoded_bytes, batch.columns)), done)
        yield from _pieces(batch, done, limits)


def _parquet_batches(path: Path, limits: Limits) -> Iterator[tuple[pa.RecordBatch, float]]:
    # Column by column, not in one piece: one of embedded pictures may be as large as the file.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=limits.piece_bytes) as file:
        rows = file.metadata.num_rows
        size = sum(file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups))
        read = 0
        for group in range(file.num_row_groups):
            for batch in _group_batches(file, group, _piece_rows(size, rows, limits)):
                read += batch.num_rows
                yield batch, min(read / max(rows, 1), 1.0)
        if read != rows:
            raise ValueError(f"it is damaged: it holds {rows} rows, of which {read} can be read")


def _group_batches(file: pq.ParquetFile, group: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Read a row group, in fewer rows at a time where they do not fit: how large they are the file does not say."""
    read = 0
    while True:
        skipped = 0
        try:
            for batch in file.iter_batches(batch_rows, row_groups=[group], use_threads=False):
                fresh = batch.slice(max(read - skipped, 0))
                skipped += batch.num_rows
                if fresh.num_rows:
                    read += fresh.num_rows
                    yield fresh
            return
        except MemoryError:
            if batch_rows == 1:
                raise
            batch_rows = max(batch_rows // 16, 1)


def _arrow_batches(path: Path, limits: Limits) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Read Arrow IPC: the file format, or the stream format that Hugging Face datasets writes."""
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from ((batch, source.tell() / source.size()) for batch in pa.ipc.open_stream(source))
        else:
            count = file.num_record_batches
            yield from ((file.get_batch(number), (number + 1) / count) for number in range(count))


def _piece_rows(size: int, rows: int, limits: Limits) -> int:
    """Rows of a piece of a table of so many bytes and rows: fewer where tables embed pictures."""
    return min(max(limits.piece_bytes * rows // max(size, 1), 1), _PIECE_ROWS)


def _check_structure(batch: pa.RecordBatch) -> None:
    """Refuse what would lead out of the file's memory: wrong offsets, indices, lengths. Texts may be anything yet."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            _without_texts(column).validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"its column '{name}' is damaged: {error}") from error


def _without_texts(column: pa.Array) -> pa.Array:
    """Return an array with bytes in place of texts, of which nothing is asked."""
    if isinstance(column, pa.DictionaryArray):
        entries = _without_texts(column.dictionary)
        return pa.DictionaryArray.from_arrays(column.indices, entries, safe=False)
    kind = _bytes_type(column.type)
    return column if kind == column.type else column.view(kind)


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    same = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if types.is_struct(kind):
        return pa.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_bytes_type(kind.value_type)), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_bytes_type(kind.value_type)))
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_bytes_type(kind.value_type)))
    return same.get(kind, kind)


def _pieces(batch: pa.RecordBatch, done: float, limits: Limits) -> Iterator[Piece]:
    """Cut a batch into pieces of a size that may be decoded. Of a row that is larger itself, only that is told."""
    if not batch.num_rows:
        return
    size = sum(map(decoded_bytes, batch.columns))
    pieces = max(-(-batch.num_rows // _PIECE_ROWS), min(-(-size // limits.piece_bytes), batch.num_rows))
    rows = -(-batch.num_rows // pieces)
    if size > limits.row_bytes and batch.num_rows > 1:
        # Sizes of several rows are bounds only, and rows are not alike.
        rows = min(rows, -(-batch.num_rows // 2))
        for start in range(0, batch.num_rows, rows):
            yield from _pieces(batch.slice(start, rows), done, limits)
    elif size > limits.row_bytes:
        yield Piece(_nothing(batch), [limits.too_long(size)], done)
    else:
        for start in range(0, batch.num_rows, rows):
            yield _piece(batch.slice(start, rows), done)


def _piece(batch: pa.RecordBatch, done: float) -> Piece:
    """Make a struct of all columns of each row; a row with a text that is not UTF-8 becomes null, with its problem."""
    names = batch.schema.names
    if not names:
        return Piece(pa.array([{}] * batch.num_rows, pa.struct([])), None, done)
    good = [True] * batch.num_rows if _is_valid(batch) else [_is_valid(batch.slice(n, 1)) for n in range(len(batch))]
    if all(good):
        return Piece(_records(batch), None, done)
    fine = pa.concat_batches([batch.slice(0, 0), *(batch.slice(row, 1) for row, is_good in enumerate(good) if is_good)])
    places = iter(range(len(fine)))
    records = _records(fine).take(pa.array([next(places) if is_good else None for is_good in good], pa.int64()))
    return Piece(records, [None if is_good else _NOT_UTF8 for is_good in good], done)


def _records(batch: pa.RecordBatch) -> pa.StructArray:
    return pa.StructArray.from_arrays([plain(column) for column in batch.columns], batch.schema.names)


def _nothing(batch: pa.RecordBatch) -> pa.StructArray:
    """Return one null, of the type of the records."""
    return _records(batch.slice(0, 0)).take(pa.array([None], pa.int64()))


def _is_valid(batch: pa.RecordBatch) -> bool:
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True

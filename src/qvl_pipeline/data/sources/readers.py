"""Reading files of rows in slabs: in order, each row by itself, in memory that does not depend on the file's length."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from qvl_pipeline.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PIECE_BYTES = 1 << 20
_PIECE_ROWS = 1024
_JSON_SPACE = " \t\n\r"


class Slab(NamedTuple):
    """Rows that follow one another in a file.

    Attributes:
        rows: Columns `record`, the JSON of a row as bytes and as yet unparsed, or a struct of its columns; and
            `problem`, which says why a row could not be taken out of its file, else null.
        done: Share of the file that is read with this slab, in (0, 1].
    """

    rows: pa.Table
    done: float


class _Piece(NamedTuple):
    records: pa.Array
    problems: list[str | None] | None  # `None`: there are none
    done: float


def read_slabs(path: Path, data_type: str, slab_bytes: int) -> Iterator[Slab]:
    """Read all rows of a file.

    Args:
        path: File to read.
        data_type: `parquet`, `arrow`, `csv`, `json` (a list of rows) or `jsonl` (a row a line). The last three may be
            compressed with gzip or zstd, whatever their name.
        slab_bytes: Size from which on a slab is full; one row more than that may be in it.

    Yields:
        Slabs in the order of the file; none of them is empty.

    Raises:
        UserError: The file as a whole cannot be read, or not to its end.
    """
    try:
        yield from _slabs(_READERS[data_type](path), slab_bytes)
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as {data_type}: {' '.join(str(error).split())}") from error


def _slabs(pieces: Iterable[_Piece], slab_bytes: int) -> Iterator[Slab]:
    held: list[_Piece] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += piece.records.nbytes
        if size >= slab_bytes:
            yield _join(held)
            size = 0
    if held:
        yield _join(held)


def _join(pieces: list[_Piece]) -> Slab:
    """Make a slab of pieces and let go of them: how long its rows are in memory is up to the caller."""
    records = pa.chunked_array([piece.records for piece in pieces])
    problems = pa.chunked_array(
        [pa.array(piece.problems or [None] * len(piece.records), pa.string()) for piece in pieces]
    )
    done = pieces[-1].done
    pieces.clear()
    return Slab(pa.table({"record": records, "problem": problems}), done)


def _read_jsonl(path: Path) -> Iterator[_Piece]:
    # By bytes: one that is not UTF-8 fails its line, not the file.
    with path.open("rb") as raw, decompressed(raw) as file:
        for lines in iter(lambda: file.readlines(_PIECE_BYTES), []):
            yield _Piece(pa.array(lines, pa.large_binary()), None, _position(raw))


def _read_json(path: Path) -> Iterator[_Piece]:
    with path.open("rb") as raw, decompressed(raw) as file:
        rows: list[bytes] = []
        size = 0
        for row in _entries(io.TextIOWrapper(file, encoding="utf-8"), path):
            rows.append(row.encode())
            size += len(row)
            if size >= _PIECE_BYTES:
                yield _Piece(pa.array(rows, pa.large_binary()), None, _position(raw))
                rows, size = [], 0
        if rows:
            yield _Piece(pa.array(rows, pa.large_binary()), None, 1.0)


def _entries(file: io.TextIOBase, path: Path) -> Iterator[str]:
    """Yield the text of every entry of a JSON list, with no more than a piece of the file in memory."""
    # Numbers are not converted: only the end of a row is looked for.
    decode = json.JSONDecoder(parse_float=str, parse_int=str).raw_decode
    text = _JsonText(file)
    if text.peek() != "[":
        raise UserError(f"'{path}' is not a list of rows: wrap its content in [ ], or set data_type: jsonl")
    text.position += 1
    separator = "["
    while separator != "]":
        if separator == "[" and text.peek() == "]":
            text.position += 1
            break
        yield text.entry(decode)
        separator = text.peek()
        if separator not in (",", "]"):
            raise ValueError(f"its rows are followed by {separator!r} instead of a comma or ]")
        text.position += 1
    if rest := text.peek():
        raise ValueError(f"the list is followed by {rest!r}")


class _JsonText:
    """A text that is read on where it must be, and forgotten where it is done with."""

    def __init__(self, file: io.TextIOBase) -> None:
        self._file = file
        self._buffer = ""
        self.position = 0

    def peek(self) -> str:
        """Return the next character that is not blank; at the end of the text, nothing."""
        while True:
            while self.position < len(self._buffer):
                if self._buffer[self.position] not in _JSON_SPACE:
                    return self._buffer[self.position]
                self.position += 1
            if not self._read_on():
                return ""

    def entry(self, decode: Callable[[str, int], tuple[Any, int]]) -> str:
        """Return the text of the value that comes next."""
        self.peek()
        while True:
            try:
                _, end = decode(self._buffer, self.position)
            except (json.JSONDecodeError, RecursionError) as error:
                # Incomplete, unless there is no more to come.
                if not self._read_on():
                    raise ValueError(f"a row is not JSON, after '{self._buffer[self.position :][:50]}'") from error
                continue
            # A number at the very end may go on.
            if end < len(self._buffer) or not self._read_on():
                found = self._buffer[self.position : end]
                self.position = end
                return found

    def _read_on(self) -> bool:
        # Doubling what is held keeps a long row from being scanned again for each piece of it.
        more = self._file.read(max(_PIECE_BYTES, len(self._buffer) - self.position))
        self._buffer = self._buffer[self.position :] + more
        self.position = 0
        return bool(more)


def _read_csv(path: Path) -> Iterator[_Piece]:
    """Read a CSV file with a header. All values are texts, and JSON where they begin with a bracket."""
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as raw, decompressed(raw) as file:
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline=""))
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError("its header names a column twice")
        records: list[bytes] = []
        problems: list[str | None] = []
        size = 0
        for row in rows:
            record, problem = _csv_record(row, header)
            records.append(record)
            problems.append(problem)
            size += len(record)
            if size >= _PIECE_BYTES or len(records) == _PIECE_ROWS:
                yield _Piece(pa.array(records, pa.large_binary()), problems, _position(raw))
                records, problems, size = [], [], 0
        if records:
            yield _Piece(pa.array(records, pa.large_binary()), problems, 1.0)


def _csv_record(row: list[str], header: list[str]) -> tuple[bytes, str | None]:
    if not row:
        return b"", "the line is empty"
    if len(row) != len(header):
        return b"", f"it has {len(row)} fields, the header {len(header)}"
    try:
        return orjson.dumps({name: _csv_value(text) for name, text in zip(header, row, strict=True)}), None
    except orjson.JSONEncodeError:
        return b"", "it holds a text that is not UTF-8"


def _csv_value(text: str) -> Any:
    if text[:1] not in ("[", "{"):
        return text or None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _read_parquet(path: Path) -> Iterator[_Piece]:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        _refuse_doubled_columns(file.schema_arrow)
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        rows = file.metadata.num_rows
        piece_rows = _piece_rows(sum(group.total_byte_size for group in groups), rows)
        yield from _table_pieces(file.iter_batches(piece_rows), rows)


def _read_arrow(path: Path) -> Iterator[_Piece]:
    """Read Arrow IPC: the file format, or the stream format that Hugging Face datasets writes."""
    with pa.memory_map(str(path)) as source:
        for batch, done in _arrow_batches(source):
            _refuse_doubled_columns(batch.schema)
            piece_rows = _piece_rows(batch.nbytes, batch.num_rows)
            for start in range(0, batch.num_rows, piece_rows):
                yield _table_piece(batch.slice(start, piece_rows), done)


def _arrow_batches(source: pa.MemoryMappedFile) -> Iterator[tuple[pa.RecordBatch, float]]:
    try:
        file = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from ((batch, source.tell() / source.size()) for batch in pa.ipc.open_stream(source))
    else:
        count = file.num_record_batches
        yield from ((file.get_batch(number), (number + 1) / count) for number in range(count))


def _piece_rows(size: int, rows: int) -> int:
    """Rows of a piece of a table of so many bytes and rows: fewer where tables embed pictures."""
    return min(max(_PIECE_BYTES * rows // max(size, 1), 1), _PIECE_ROWS)


def _table_pieces(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[_Piece]:
    read = 0
    for batch in batches:
        read += batch.num_rows
        yield _table_piece(batch, read / rows)
    if read != rows:
        raise ValueError(f"it is damaged: it holds {rows} rows, of which {read} can be read")


def _table_piece(batch: pa.RecordBatch, done: float) -> _Piece:
    """Make a struct of all columns of each row; a row with a text that is not UTF-8 becomes null, with its problem."""
    names = batch.schema.names
    if not names:
        return _Piece(pa.array([{}] * batch.num_rows, pa.struct([])), None, done)
    records = pa.StructArray.from_arrays([_plain(column) for column in batch.columns], names)
    if _is_valid(batch):
        return _Piece(records, None, done)
    good = [_is_valid(batch.slice(row, 1)) for row in range(batch.num_rows)]
    records = records.take(pa.array([row if fine else None for row, fine in enumerate(good)], pa.int64()))
    return _Piece(records, [None if fine else "it holds a text that is not UTF-8" for fine in good], done)


def _plain(column: pa.Array) -> pa.Array:
    """Decode dictionaries, and take the storage of extension types: a categorical text is a text."""
    if isinstance(column.type, pa.ExtensionType):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_valid(batch: pa.RecordBatch) -> bool:
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _refuse_doubled_columns(schema: pa.Schema) -> None:
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("its columns are ambiguous: two have the same name")


def decompressed(file: BinaryIO) -> BinaryIO:
    """Return the content of a file that may be compressed, without its byte order mark."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(_GZIP):
        content: BinaryIO = io.BufferedReader(gzip.GzipFile(fileobj=file), _PIECE_BYTES)
    elif start == _ZSTD:
        # Not the package zstandard, which takes the end of a file that is cut off for the end of its content.
        content = io.BufferedReader(pa.CompressedInputStream(file, "zstd"), _PIECE_BYTES)
    else:
        content = io.BufferedReader(file, _PIECE_BYTES)
    if content.peek(3)[:3] == _BYTE_ORDER_MARK:
        content.read(3)
    return content


def _position(file: BinaryIO) -> float:
    """Share of a file that is read, in its compressed bytes."""
    return file.tell() / max(os.fstat(file.fileno()).st_size, 1)


_READERS: dict[str, Callable[[Path], Iterator[_Piece]]] = {
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "csv": _read_csv,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "hf_dataset": _read_arrow,
}

"""Reading rows of text: JSON lines, JSON lists, CSV, also compressed; what is no row, or too long, is one bad row."""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa

from qvl_pipeline.data.sources.files.json_list import list_entries
from qvl_pipeline.data.sources.files.limits import Guard, Limits
from qvl_pipeline.data.sources.files.tables import Piece

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BUFFER_BYTES = 1 << 20
_PIECE_ROWS = 1024

Row = tuple[bytes, str | None]  # JSON of a row, and why there is none


def _read_jsonl(path: Path, limits: Limits) -> Iterator[Piece]:
    # By bytes: one that is not UTF-8 fails its line, not the file.
    with path.open("rb") as raw, decompressed(raw, limits.guard(path)) as file:
        while block := file.read(min(limits.piece_bytes, limits.row_bytes)):
            yield _lines(block, file, limits, lambda: position(raw))


def _lines(block: bytes, file: BinaryIO, limits: Limits, done: Callable[[], float]) -> Piece:
    """Take the lines of a block, and the rest of its last one, out of a file: where they end, as columns.

    Lines of Python one by one would take a third as long as reading the rows does.
    """
    begun = len(block) - 1 - block.rfind(b"\n")  # bytes of a line that goes on behind the block
    rest = file.readline(limits.row_bytes - begun) if begun else b""
    is_too_long = begun + len(rest) >= limits.row_bytes and not rest.endswith(b"\n")
    if is_too_long:
        while not rest.endswith(b"\n") and (rest := file.readline(_BUFFER_BYTES)):
            pass
        block, rest = block[: len(block) - begun], b""
    content = block + rest
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
    if content and (not len(ends) or ends[-1] < len(content)):  # the last line of a file may not end
        ends = np.append(ends, len(content))
    lines = len(ends) + is_too_long
    offsets = np.concatenate([[0], ends, [len(content)] * is_too_long]).astype(np.int64)
    records = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), lines, [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    )
    return Piece(records, [None] * (lines - 1) + [limits.too_long()] if is_too_long else None, done())


def _read_json(path: Path, limits: Limits) -> Iterator[Piece]:
    with path.open("rb") as raw, decompressed(raw, limits.guard(path)) as file:
        yield from _pieces(list_entries(file, path, limits), raw, limits)


def _read_csv(path: Path, limits: Limits) -> Iterator[Piece]:
    """Read a CSV file with a header. All values are texts, and JSON where they begin with a bracket."""
    csv.field_size_limit(sys.maxsize)  # lines are counted instead
    with path.open("rb") as raw, decompressed(raw, limits.guard(path)) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield from _pieces(_csv_rows(_CsvLines(text, limits), limits), raw, limits)


class _TooLongError(csv.Error):
    """A row is too long."""


class _CsvLines:
    """The lines of a CSV file; those of a row that is too long end in an error, after which others come."""

    def __init__(self, file: io.TextIOBase, limits: Limits) -> None:
        self._file = file
        self._most = limits.row_bytes
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._most)
        self._size += len(line)
        if self._size < self._most:
            if not line:
                raise StopIteration
            return line
        while not line.endswith(("\n", "\r")) and (line := self._file.readline(_BUFFER_BYTES)):
            pass
        raise _TooLongError

    def start_row(self) -> None:
        self._size = 0


def _csv_rows(lines: _CsvLines, limits: Limits) -> Iterator[Row]:
    rows = csv.reader(lines)
    header = next(rows, [])
    if len(set(header)) < len(header):
        raise ValueError("its header names a column twice")
    while True:
        lines.start_row()
        try:
            yield _csv_record(next(rows), header)
        except StopIteration:
            return
        except _TooLongError:
            yield b"", limits.too_long()
        except csv.Error as error:
            yield b"", f"it is not CSV ({error})"


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


def _pieces(rows: Iterator[Row], raw: BinaryIO, limits: Limits) -> Iterator[Piece]:
    """Put rows together; of what follows the last one, nothing has been read."""
    records: list[bytes] = []
    problems: list[str | None] = []
    size = 0
    for record, problem in rows:
        records.append(record)
        problems.append(problem)
        size += len(record)
        if size >= limits.piece_bytes or len(records) == _PIECE_ROWS:
            yield _piece(records, problems, position(raw))
            records, problems, size = [], [], 0
    if records:
        yield _piece(records, problems, 1.0)


def _piece(records: list[bytes], problems: list[str | None], done: float) -> Piece:
    return Piece(pa.array(records, pa.large_binary()), problems if any(problems) else None, done)


def decompressed(file: BinaryIO, guard: Guard | None = None) -> BinaryIO:
    """Return the content of a file that may be compressed, without its byte order mark.

    Args:
        file: The file.
        guard: Told of all that is decompressed; refuses too much of it.
    """
    start = file.read(4)
    file.seek(0)
    if start.startswith(_GZIP):
        content = _guarded(gzip.GzipFile(fileobj=file), file, guard)
    elif start == _ZSTD:
        # Not the package zstandard, which takes the end of a file that is cut off for the end of its content.
        content = _guarded(pa.CompressedInputStream(file, "zstd"), file, guard)
    else:
        content = io.BufferedReader(file, _BUFFER_BYTES)
    if content.peek(3)[:3] == _BYTE_ORDER_MARK:
        content.read(3)
    return content


def position(file: BinaryIO) -> float:
    """Share of a file that is read, in its compressed bytes."""
    return file.tell() / max(os.fstat(file.fileno()).st_size, 1)


def _guarded(content: Any, file: BinaryIO, guard: Guard | None) -> BinaryIO:
    return io.BufferedReader(content if guard is None else _Counted(content, file, guard), _BUFFER_BYTES)


class _Counted(io.RawIOBase):
    """Decompressed content, of which a guard is told."""

    def __init__(self, content: Any, file: BinaryIO, guard: Guard) -> None:
        self._content = content
        self._file = file
        self._guard = guard

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._content.readinto(buffer)
        self._guard.add(size, position(self._file))
        return size


TEXTS: dict[str, Callable[[Path, Limits], Iterator[Piece]]] = {
    "csv": _read_csv,
    "json": _read_json,
    "jsonl": _read_jsonl,
}

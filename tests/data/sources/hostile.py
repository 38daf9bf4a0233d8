"""Files of rows that are made to do harm: each small, each named for what it tries."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

MIB = 1 << 20
TURNS = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]


def write_arrow(path: Path, table: pa.Table, **options: str) -> None:
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


def _patched(path: Path, table: pa.Table, before: list[int], after: list[int], kind: str = "<i") -> None:
    """Write a table, and put other numbers in the place of some that are in it once."""
    write_arrow(path, table)
    old, new = (b"".join(struct.pack(kind, number) for number in numbers) for numbers in (before, after))
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def wrong_offsets(path: Path) -> None:
    """The second list begins a gigabyte behind the end of its values."""
    lists = pa.array([[7] * 3, [7] * 4, [7] * 5, [7] * 6])
    _patched(path, pa.table({"messages": lists}), [0, 3, 7, 12, 18], [0, 1 << 30, (1 << 30) + 9, 12, 18])


def wrong_offsets_of_texts(path: Path) -> None:
    texts = pa.array(["abc", "defg", "hijkl", "mnopqr"])
    _patched(path, pa.table({"messages": texts}), [0, 3, 7, 12, 18], [0, 1 << 30, (1 << 30) + 9, 12, 18])


def wrong_indices(path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1, 1, 0], pa.int32()), pa.array(["a", "b"]))
    _patched(path, pa.table({"messages": column}), [1, 0, 1, 1, 0], [1, 0, 1 << 28, 1, 0])


def dictionary_of_parquet(path: Path) -> None:
    """One text of a mebibyte, used 8,000 times."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), pa.array(["x" * MIB]))
    pq.write_table(pa.table({"messages": column}), path, compression="zstd")


def dictionary_of_arrow(path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), pa.array(["x" * MIB]))
    write_arrow(path, pa.table({"messages": column}), compression="zstd")


def zeros_of_arrow(path: Path) -> None:
    """A buffer that is a gigabyte of zeros once it is decompressed."""
    write_arrow(
        path,
        pa.table(
            {
                "messages": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(MIB), 1024, [None, pa.py_buffer(bytes(1024 * MIB))]
                )
            }
        ),
        compression="zstd",
    )


def nulls(path: Path) -> None:
    """Two billion rows that take no byte."""
    batch = pa.record_batch({"messages": pa.nulls((1 << 31) - 1)})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def list_of_nulls(path: Path) -> None:
    """A row that is a list of two billion nulls."""
    offsets = pa.array([0, (1 << 31) - 1], pa.int32())
    write_arrow(path, pa.table({"messages": pa.ListArray.from_arrays(offsets, pa.nulls((1 << 31) - 1))}))


def long_run(path: Path) -> None:
    """One text of a mebibyte, two billion times in a row."""
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([(1 << 31) - 1], pa.int32()), pa.array(["x" * MIB]))
    write_arrow(path, pa.table({"messages": runs}), compression="zstd")


def one_line(path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        file.write(packer.compress(b'{"messages": "'))
        for _ in range(3000):
            file.write(packer.compress(b"x" * MIB))
        file.write(packer.flush())


def many_lines(path: Path) -> None:
    line = json.dumps({"messages": [*TURNS, {"role": "user", "content": "x" * 4000}]}).encode() + b"\n"
    path.write_bytes(zstandard.compress(line * 20_000) * 40)


def one_row(path: Path) -> None:
    path.write_bytes(zstandard.compress(b'[{"messages": "' + b"x" * (700 * MIB)))


def one_field(path: Path) -> None:
    path.write_bytes(gzip.compress(b'messages\n"' + b"x" * (100 * MIB) + b'"\nnext\n', 1))


# With the type that they are declared as.
FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    make.__name__: (kind, make)
    for kind, make in (
        ("arrow", wrong_offsets),
        ("arrow", wrong_offsets_of_texts),
        ("arrow", wrong_indices),
        ("parquet", dictionary_of_parquet),
        ("arrow", dictionary_of_arrow),
        ("arrow", zeros_of_arrow),
        ("arrow", nulls),
        ("arrow", list_of_nulls),
        ("arrow", long_run),
        ("jsonl", one_line),
        ("jsonl", many_lines),
        ("json", one_row),
        ("csv", one_field),
    )
}

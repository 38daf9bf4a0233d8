"""Reading files of rows with Daft: whole, in order, and each row by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import daft
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from daft.exceptions import DaftCoreException
from daft.functions import to_struct

from qvl_pipeline.errors import UserError

Records = tuple[daft.DataFrame, int]  # one column `record`, and how many rows there are

_SLAB_BYTES = 16 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def map_records(path: Path, data_type: str, function: Callable[[daft.Expression], daft.Expression]) -> pa.Table:
    """Apply a batch function to every row of a file, on all cores.

    Args:
        path: File to read.
        data_type: `parquet`, `json` (a list of rows) or `jsonl` (a row a line).
        function: Daft function of the rows. It gets a struct of all columns of Parquet; else the JSON of the row as
            bytes, as yet unparsed.

    Returns:
        What the function returned for each row, in the order of the file.

    Raises:
        UserError: The file as a whole cannot be read.
    """
    try:
        frame, count = _READERS[data_type](path)
        table = frame.select(function(daft.col("record"))).to_arrow()
    except (DaftCoreException, pa.ArrowInvalid, orjson.JSONDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as {data_type}: {' '.join(str(error).split())}") from error
    # Daft 0.7.26 sometimes returns the rows it has instead of the error it met.
    if table.num_rows != count:
        raise UserError(f"'{path}' is damaged: it holds {count} rows, of which {table.num_rows} can be read")
    return table


def _read_parquet(path: Path) -> Records:
    # One file at a time: of several, Daft takes the schema of the first and nulls what does not fit it.
    frame = daft.read_parquet(_escaped(path.absolute()))
    record = to_struct(*(daft.col(name) for name in frame.column_names)).alias("record")
    return frame.select(record), pq.read_metadata(path).num_rows


def _read_json(path: Path) -> Records:
    rows = orjson.loads(path.read_bytes().removeprefix(_BYTE_ORDER_MARK))
    if not isinstance(rows, list):
        raise UserError(f"'{path}' is not a list of rows: wrap its content in [ ], or set data_type: jsonl")
    return _records([pa.array(map(orjson.dumps, rows), pa.large_binary())])


def _read_jsonl(path: Path) -> Records:
    # Not daft.read_text: one byte that is not UTF-8 would fail the whole file instead of its line.
    with path.open("rb") as file:
        file.seek(len(_BYTE_ORDER_MARK) if file.read(3) == _BYTE_ORDER_MARK else 0)
        return _records([pa.array(lines, pa.large_binary()) for lines in iter(lambda: file.readlines(_SLAB_BYTES), [])])


def _records(slabs: list[pa.Array]) -> Records:
    table = pa.table({"record": pa.chunked_array(slabs, pa.large_binary())})
    return daft.from_arrow(table), table.num_rows


def _escaped(path: Path) -> str:
    r"""Escape what Daft takes for a pattern: unescaped, `a[1].parquet` would silently read `a1.parquet`."""
    return "".join(f"\\{character}" if character in r"*?[]{}\\" else character for character in path.as_posix())


_READERS = {"parquet": _read_parquet, "json": _read_json, "jsonl": _read_jsonl}

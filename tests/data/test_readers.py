"""Files of rows are read whole, in order, and by their own name; what is no such file is refused by name."""

from __future__ import annotations

import time
from pathlib import Path

import daft
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.data.readers import map_records
from qvl_pipeline.errors import UserError


def _records(path: Path, data_type: str) -> list[object]:
    seen: list[object] = []

    @daft.func.batch(return_dtype=daft.DataType.int64())
    def note(records: daft.Series) -> list[int]:
        seen.extend(records.to_pylist())
        return [0] * len(records)

    assert map_records(path, data_type, note).num_rows == len(seen)
    return seen


def test_jsonl_is_a_record_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\r\n\n  \n{"b": "\xff"}\nlast')
    assert _records(path, "jsonl") == [b'{"a":1}\r\n', b"\n", b"  \n", b'{"b": "\xff"}\n', b"last"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf[1]", b"[1]"])
@pytest.mark.parametrize("data_type", ["json", "jsonl"])
def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, content: bytes, data_type: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    assert _records(path, data_type) == {"json": [b"1"], "jsonl": [b"[1]"]}[data_type]


def test_json_is_a_record_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[ {"a": [1, 2]}, null, "x" ]')
    assert _records(path, "json") == [b'{"a":[1,2]}', b"null", b'"x"']


def test_parquet_is_a_struct_of_all_columns(tmp_path: Path) -> None:
    rows = [{"a": 1, "messages": [{"role": "user"}], "n": None}, {"a": None, "messages": None, "n": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert _records(tmp_path / "a.parquet", "parquet") == rows


@pytest.mark.parametrize("data_type", ["json", "jsonl", "parquet"])
def test_file_without_rows(tmp_path: Path, data_type: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"[]" if data_type == "json" else b"")
    if data_type == "parquet":
        pq.write_table(pa.table({"messages": pa.array([], pa.string())}), path)
    assert _records(path, data_type) == []


def test_rows_keep_their_order_whatever_takes_how_long(tmp_path: Path) -> None:
    rows = 20_000
    pq.write_table(pa.table({"a": range(rows)}), tmp_path / "a.parquet", row_group_size=501)

    @daft.func.batch(return_dtype=daft.DataType.int64(), batch_size=1000)
    def slow_at_first(records: daft.Series) -> list[int]:
        numbers = [record["a"] for record in records.to_pylist()]
        time.sleep(0.2 if numbers[0] < rows / 4 else 0)
        return numbers

    table = map_records(tmp_path / "a.parquet", "parquet", slow_at_first)
    assert table.column(0).to_pylist() == list(range(rows))


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "q?*.parquet", "sp ace%20#.parquet", "é{a,b}.parquet", r"b\s.parquet"]
)
def test_names_are_no_patterns(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / name)
    pq.write_table(pa.table({"a": [2]}), tmp_path / "a1.parquet")
    assert _records(tmp_path / name, "parquet") == [{"a": 1}]


@pytest.mark.parametrize(
    ("data_type", "content", "reason"),
    [
        ("parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
        ("json", b'{"messages": []}', "is not a list of rows"),
        ("json", b'{"messages": []}\n{"messages": []}\n', "cannot be read as json"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data_type: str, content: bytes, reason: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        _records(path, data_type)
    assert f"'{path}'" in str(caught.value)


def test_parquet_with_a_doubled_column_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"cannot be read as parquet: .*ambiguous"):
        _records(tmp_path / "a.parquet", "parquet")


def test_damaged_parquet_never_passes_for_an_empty_one(tmp_path: Path) -> None:
    """Daft returns no rows, without an error, in about every third of these attempts."""
    not_utf8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"ok"], pa.binary()).buffers())
    pq.write_table(pa.table({"messages": not_utf8}), tmp_path / "a.parquet")
    for _ in range(10):
        with pytest.raises(UserError, match=r"is damaged|UTF-8"):
            _records(tmp_path / "a.parquet", "parquet")


def test_numbers_that_json_cannot_hold_do_not_break_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[123456789012345678901234567890]")
    assert orjson.loads(_records(path, "json")[0]) == pytest.approx(1.2345678901234568e29)

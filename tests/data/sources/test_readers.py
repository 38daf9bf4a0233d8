"""Files of rows are read in slabs, in order; what is no such file is refused by name."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.readers import RowFiles, Slab
from qvl_pipeline.errors import UserError

TEXTS = {"json": b'[{"a":1},\n {"a":2}]', "jsonl": b'{"a":1}\n{"a":2}\n', "csv": b"a\n1\n2\n"}


def read_slabs(path: Path, data_type: str, slab_bytes: int, memory_bytes: int = 2 << 30) -> Iterator[Slab]:
    with RowFiles(Limits(memory_bytes, slab_bytes)) as files:
        yield from files.slabs(path, data_type)


def _records(path: Path, data_type: str, slab_bytes: int = 1 << 20) -> list[Any]:
    return [record for slab in read_slabs(path, data_type, slab_bytes) for record in slab.rows["record"].to_pylist()]


def _problems(path: Path, data_type: str) -> list[str | None]:
    return [text for slab in read_slabs(path, data_type, 1 << 20) for text in slab.rows["problem"].to_pylist()]


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("slab_bytes", [4, 40, 4000])
def test_lines_are_whole_wherever_a_block_of_the_file_ends(tmp_path: Path, slab_bytes: int, end: bytes) -> None:
    """A line may have 64 bytes, its end included; of one that ends nowhere, 63."""
    lines = [bytes([97 + n % 26]) * n for n in (*range(70), 63, 64, 200, 1, 0, 62, 63)]
    path = _write(tmp_path / "a.jsonl", b"\n".join(lines) + end)
    slabs = list(read_slabs(path, "jsonl", slab_bytes, memory_bytes=50 * 64))
    found = [row for slab in slabs for row in slab.rows.to_pylist()]
    whole = [line + b"\n" for line in lines[:-1]] + [lines[-1] + end]
    assert [row["record"] for row in found] == [line if len(line) <= 64 else b"" for line in whole]
    assert [row["problem"] is None for row in found] == [len(line) <= 64 for line in whole]
    assert slabs[-1].done == 1.0


def test_jsonl_is_a_record_a_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", b'{"a":1}\r\n\n  \n{"b": "\xff"}\nlast')
    assert _records(path, "jsonl") == [b'{"a":1}\r\n', b"\n", b"  \n", b'{"b": "\xff"}\n', b"last"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf[1]", b"[1]"])
@pytest.mark.parametrize("data_type", ["json", "jsonl"])
def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, content: bytes, data_type: str) -> None:
    assert _records(_write(tmp_path / "a", content), data_type) == {"json": [b"1"], "jsonl": [b"[1]"]}[data_type]


def test_json_is_a_record_an_entry(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", b'[ {"a": [1, 2]}, null\n,"x]", NaN , 12345678901234567890123, "\xc3\xa9" ] ')
    assert _records(path, "json") == [
        b'{"a": [1, 2]}',
        b"null",
        b'"x]"',
        b"NaN",
        b"12345678901234567890123",
        b'"\xc3\xa9"',
    ]


def test_json_rows_across_the_pieces_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"number": number, "text": "é" * (number % 50)} for number in range(200)] + [123456789, -0.5e10, "[,]"]
    path = _write(tmp_path / "a.json", orjson.dumps(rows, option=orjson.OPT_INDENT_2))
    for size in (1, 7, 64):
        monkeypatch.setattr("qvl_pipeline.data.sources.files.json_list._BUFFER_CHARS", size)
        assert [orjson.loads(record) for record in _records(path, "json")] == rows


def test_csv_is_an_object_a_line(tmp_path: Path) -> None:
    text = 'messages,image,note\n"[{""role"": ""user""}]",a.png,"two\nlines"\n[not json,,1\n'
    assert [orjson.loads(record) for record in _records(_write(tmp_path / "a.csv", text.encode()), "csv")] == [
        {"messages": [{"role": "user"}], "image": "a.png", "note": "two\nlines"},
        {"messages": "[not json", "image": None, "note": "1"},
    ]


def test_csv_rows_that_are_none_have_a_problem(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", b"a,b\n1,2\n1\n1,2,3\n\n\xff,2\n3,4\n")
    assert _problems(path, "csv") == [
        None,
        "it has 1 fields, the header 2",
        "it has 3 fields, the header 2",
        "the line is empty",
        "it holds a text that is not UTF-8",
        None,
    ]


def _write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path)


def _write_ipc(open_writer: Callable[[str, pa.Schema], pa.ipc.RecordBatchStreamWriter]) -> Callable:
    def write(table: pa.Table, path: Path) -> None:
        with open_writer(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=30)

    return write


TABLES = {
    "parquet": _write_parquet,
    "arrow": _write_ipc(pa.ipc.new_file),
    "hf_dataset": _write_ipc(pa.ipc.new_stream),
}


@pytest.mark.parametrize("data_type", TABLES)
def test_tables_are_structs_of_all_columns(tmp_path: Path, data_type: str) -> None:
    rows = [{"a": 1, "messages": [{"role": "user"}], "n": None}, {"a": None, "messages": None, "n": None}]
    TABLES[data_type](pa.Table.from_pylist(rows * 5), tmp_path / "a")
    assert _records(tmp_path / "a", data_type) == rows * 5


@pytest.mark.parametrize("data_type", TABLES)
def test_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path, data_type: str) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff\xfe", b"ok"], pa.binary()).buffers())
    TABLES[data_type](pa.table({"messages": texts, "n": [1, 2, 3]}), tmp_path / "a")
    assert _records(tmp_path / "a", data_type) == [{"messages": "a", "n": 1}, None, {"messages": "ok", "n": 3}]
    assert _problems(tmp_path / "a", data_type) == [None, "it holds a text that is not UTF-8", None]


def test_categories_are_texts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"split": pa.array(["train", "eval"]).dictionary_encode()}), tmp_path / "a")
    assert _records(tmp_path / "a", "parquet") == [{"split": "train"}, {"split": "eval"}]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
@pytest.mark.parametrize("data_type", TEXTS)
def test_compressed_files_are_read_as_they_are(tmp_path: Path, data_type: str, compress: Callable) -> None:
    plain = _records(_write(tmp_path / "plain", TEXTS[data_type]), data_type)
    half = len(TEXTS[data_type]) // 2
    # Of two frames, as tools leave that compress in parallel.
    content = compress(TEXTS[data_type][:half]) + compress(TEXTS[data_type][half:])
    assert _records(_write(tmp_path / "a", content), data_type) == plain
    assert len(plain) == 2


@pytest.mark.parametrize("data_type", [*TEXTS, *TABLES])
def test_file_without_rows(tmp_path: Path, data_type: str) -> None:
    path = _write(tmp_path / "a", {"json": b"[ ]", "csv": b"a,b\n"}.get(data_type, b""))
    if data_type in TABLES:
        TABLES[data_type](pa.table({"messages": pa.array([], pa.string())}), path)
    assert _records(path, data_type) == []


@pytest.mark.parametrize("data_type", [*TEXTS, *TABLES])
def test_slabs_are_small_and_say_how_far_they_got(tmp_path: Path, data_type: str) -> None:
    rows = [{"a": number, "text": "x" * 50} for number in range(500)]
    path = tmp_path / "a"
    if data_type in TABLES:
        TABLES[data_type](pa.Table.from_pylist(rows), path)
    elif data_type == "json":
        path.write_bytes(orjson.dumps(rows))
    else:
        lines = [b"%d,%s" % (row["a"], row["text"].encode()) for row in rows]
        path.write_bytes(b"\n".join([b"a,text", *lines] if data_type == "csv" else map(orjson.dumps, rows)))
    slabs = list(read_slabs(path, data_type, 4000))
    assert len(slabs) > 5
    assert max(slab.rows.nbytes for slab in slabs) < 10_000
    assert sum(slab.rows.num_rows for slab in slabs) == 500
    done = [slab.done for slab in slabs]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("data_type", TABLES)
def test_tables_of_large_rows_are_read_in_few_rows_at_a_time(tmp_path: Path, data_type: str) -> None:
    pictures = [{"bytes": bytes([number]) * 200_000} for number in range(60)]
    TABLES[data_type](pa.table({"image": pictures}), tmp_path / "a")
    slabs = list(read_slabs(tmp_path / "a", data_type, 2_000_000))
    assert max(slab.rows.nbytes for slab in slabs) < 3_500_000
    assert [row["image"] for slab in slabs for row in slab.rows["record"].to_pylist()] == pictures


@pytest.mark.parametrize(
    ("data_type", "content", "reason"),
    [
        ("parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
        ("arrow", b"ARROW1 and then nothing", "cannot be read as arrow"),
        ("arrow", b"", "cannot be read as arrow"),
        ("json", b'{"messages": []}', "is not a list of rows"),
        ("json", b"", "is not a list of rows"),
        ("json", b'{"messages": []}\n{"messages": []}\n', "is not a list of rows"),
        ("json", b"[1, 2", "its rows are followed by ''"),
        ("json", b"[1 2]", "its rows are followed by '2'"),
        ("json", b"[1, 2,]", "a row is not JSON, after ']'"),
        ("json", b'[1, {"a": ]', "its rows are followed by ''"),
        ("json", b'[1, {"a": "', 'a row is not JSON, after \'{"a": "\''),
        ("json", b"[1] 2", "the list is followed by '2'"),
        ("jsonl", gzip.compress(TEXTS["jsonl"] * 99, mtime=0)[:-20], "cannot be read as jsonl: Compressed file ended"),
        ("jsonl", b"\x1f\x8b and then nothing", "cannot be read as jsonl"),
        ("jsonl", b"\x28\xb5\x2f\xfd and then nothing", "cannot be read as jsonl"),
        ("csv", b"a,b,a\n1,2,3\n", "its header names a column twice"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data_type: str, content: bytes, reason: str) -> None:
    path = _write(tmp_path / "a", content)
    with pytest.raises(UserError) as caught:
        _records(path, data_type)
    assert f"'{path}'" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("data_type", TABLES)
def test_table_with_a_doubled_column_is_refused(tmp_path: Path, data_type: str) -> None:
    TABLES[data_type](pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a")
    with pytest.raises(UserError, match=r"its columns are ambiguous"):
        _records(tmp_path / "a", data_type)


def test_zstd_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:
        writer.write(TEXTS["jsonl"] * 10_000)
    with pytest.raises(UserError, match="cannot be read as jsonl"):
        _records(_write(tmp_path / "a", stream.getvalue()[:-10]), "jsonl")

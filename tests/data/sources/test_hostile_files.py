"""Files of rows that are made to do harm end a row, or are named; they neither end the process nor fill its memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qvl_pipeline.config import DataEngineConfig, IngestConfig
from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.readers import RowFiles
from qvl_pipeline.data.sources.files.sizes import decoded_bytes, plain
from qvl_pipeline.data.sources.files.tables import read_table
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.errors import UserError
from tests.data.sources.hostile import FILES, MIB, TURNS, write_arrow

BOMB = r"it is a decompression bomb: its [\d,]+ bytes hold about [\d,.]+ GiB"
DAMAGED = "its column 'messages' is damaged"
REFUSED = {
    **dict.fromkeys(("wrong_offsets", "wrong_offsets_of_texts", "wrong_indices"), DAMAGED),
    **dict.fromkeys(("dictionary_of_parquet", "dictionary_of_arrow", "nulls", "list_of_nulls", "long_run"), BOMB),
    "zeros_of_arrow": "a part of it needs more memory to be decoded than data_engine.memory_limit_gib allows",
}


def _rows(path: Path, data_type: str, limits: Limits) -> list[tuple[Any, str | None]]:
    with RowFiles(limits) as files:
        return [
            (row["record"], row["problem"]) for slab in files.slabs(path, data_type) for row in slab.rows.to_pylist()
        ]


def _ingest(path: Path, data_type: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    config = IngestConfig(datasets=[{"name": "a", "path": str(path), "data_type": data_type}])
    ingest_sources(config, list_files(config), DataEngineConfig(), Path())
    return tuple(pq.read_table(f"{name}.parquet").to_pylist() for name in ("samples", "rejects"))


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_table_is_refused_by_name(name: str) -> None:
    kind, make = FILES[name]
    make(Path(name))
    with pytest.raises(UserError, match=f"^'{name}' cannot be read as {kind}: .*{REFUSED[name]}"):
        _rows(Path(name), kind, Limits(1 << 30, 1 << 24))


def test_a_table_that_ends_the_process_that_reads_it_is_refused_and_others_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As crafted offsets do where Arrow does not look at them."""
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(
        "import os, pyarrow.parquet as pq\nread = pq.ParquetFile\n"
        "pq.ParquetFile = lambda path, **options: os.abort() if 'bad' in str(path) else read(path, **options)\n"
    )
    monkeypatch.syspath_prepend("site")
    for name in ("bad", "good"):
        pq.write_table(pa.table({"a": [1, 2]}), name)
    with RowFiles(Limits(1 << 30, 1 << 20)) as files:
        for _ in range(2):
            with pytest.raises(UserError, match=r"^'bad' cannot be read as parquet: it ended the process .*status -6"):
                list(files.slabs(Path("bad"), "parquet"))
            assert [slab.rows.num_rows for slab in files.slabs(Path("good"), "parquet")] == [2]
        next(files.slabs(Path("good"), "parquet"))  # one that is left in the middle does not spoil the next
        assert [slab.rows["record"].to_pylist() for slab in files.slabs(Path("good"), "parquet")] == [
            [{"a": 1}, {"a": 2}]
        ]
        process = files._tables._child
    assert process.returncode is not None


def test_memory_stays_within_its_limit() -> None:
    """Of the reading process and of its child, measured in a process of its own."""
    bombs = [name for name in FILES if name not in ("wrong_offsets", "wrong_indices", "one_line", "many_lines")]
    code = f"""
import resource, sys
from pathlib import Path
sys.path[:] = {sys.path!r}
from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.readers import RowFiles
from qvl_pipeline.data.sources.files.tables import read_table
from qvl_pipeline.errors import UserError
from tests.data.sources.hostile import FILES
with RowFiles(Limits(1 << 30, 1 << 24)) as files:
    for name in {bombs!r}:
        try:
            for slab in files.slabs(Path(name), FILES[name][0]):
                assert slab.rows.nbytes < 64 << 20
        except UserError:
            pass
own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(own.split()[1]) >> 10, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""
    for name in bombs:
        FILES[name][1](Path(name))
    command = [sys.executable, "-c", code]
    own, child = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert own + child < 1024


def test_a_row_that_is_too_long_is_one_bad_row() -> None:
    limits = Limits(50 * MIB, MIB)
    rows = [{"a": "x" * size} for size in (9, MIB - 9, MIB + 9, 3 * MIB, 5)]
    problem = "it takes {} than the 1 MiB that data_engine.memory_limit_gib allows"
    more, table = problem.format("more"), pa.Table.from_pylist(rows)
    texts = {
        "jsonl": b"\n".join(map(orjson.dumps, rows)),
        "json": orjson.dumps(rows),
        "csv": b"\n".join([b"a", *(row["a"].encode() for row in rows)]),
    }
    for kind, text in texts.items():
        for content in (text, gzip.compress(text)):
            Path("a").write_bytes(content)
            found = _rows(Path("a"), kind, limits)
            assert [(orjson.loads(row) if row else None, why) for row, why in found] == [
                *((row, None) for row in rows[:2]),
                *[(None, more)] * 2,
                (rows[4], None),
            ], kind
    pq.write_table(table, "a")
    sized = [problem.format(f"{size} MiB, more") for size in (1, 3)]
    assert _rows(Path("a"), "parquet", Limits(512 * MIB, MIB)) == [(row, None) for row in rows]
    write_arrow(Path("a"), table)
    assert _rows_here(Path("a"), limits) == [
        (rows[0], None),
        (rows[1], None),
        (None, sized[0]),
        (None, sized[1]),
        (rows[4], None),
    ]


def _rows_here(path: Path, limits: Limits) -> list[tuple[Any, str | None]]:
    """Read a table in this process: the limit of this test is too small for one to start in."""
    return [
        pair
        for piece in read_table(path, "arrow", limits)
        for pair in zip(piece.records.to_pylist(), piece.problems or [None] * len(piece.records), strict=True)
    ]


def test_a_file_that_unpacks_to_much_more_than_it_is_is_refused_early() -> None:
    Path("a").write_bytes(zstandard.compress(b'{"a": 1}\n' * (16 * MIB)))
    with pytest.raises(UserError, match=f"^'a' cannot be read as jsonl: {BOMB}"):
        _rows(Path("a"), "jsonl", Limits(50 * MIB, MIB))


@pytest.mark.parametrize(
    "row",
    [
        b'{"messages": "\xff"}',
        b'{"messages": %s%s}' % (b"[" * 100_000, b"]" * 100_000),
        b"[" * 3000 + b"]" * 3000,
        b'{"messages": tru}',
        b'{"messages": [,]}',
        b'{"messages": "a]}, \\" {[", }',
        b"nothing",
        b"{'a': 1}",
        b'"\\ud800"',
    ],
    ids=range(9),
)
def test_a_bad_row_of_a_json_list_costs_itself_alone(row: bytes) -> None:
    good = json.dumps({"messages": TURNS}).encode()
    Path("a.json").write_bytes(b"[" + b" ,\n".join([good, row, good]) + b"]")
    samples, rejects = _ingest(Path("a.json"), "json")
    assert [sample["row"] for sample in samples] == [0, 2]
    assert [(reject["row"], reject["rule"]) for reject in rejects] == [(1, "unreadable_row")]


COLUMNS = {
    "views": (pa.array(["a text longer than twelve", None], pa.string_view()), ["a text longer than twelve", None]),
    "bytes": (pa.array([b"a text longer than twelve", b"x"], pa.binary_view()), ["25 bytes", "1 bytes"]),
    "runs": (pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["a"])), ["a", "a"]),
    "list_views": (pa.array([[1, 2], None], pa.list_view(pa.int32())), [[1, 2], None]),
    "inner": (pa.array([["a" * 20], []], pa.list_(pa.string_view())), [["a" * 20], []]),
    "inner_categories": (
        pa.ListArray.from_arrays([0, 1, 2], pa.array(["a", "b"]).dictionary_encode()),
        [["a"], ["b"]],
    ),
    "far": (pa.array([10**16, None], pa.timestamp("s")), ["<value out of range: 10000000000000000>", None]),
    "inner_far": (
        pa.array([[2**62], None], pa.list_(pa.timestamp("us"))),
        [["<value out of range: 4611686018427387904>"], None],
    ),
    "near": (pa.array([10**9, None], pa.timestamp("s")), ["2001-09-09T01:46:40", None]),
    "days": (pa.array([2**30, None], pa.date32()), ["<value out of range: 1073741824>", None]),
    "time": (pa.array([1000, None], pa.time32("ms")), ["00:00:01.000", None]),
    "wide": (pa.array([1, None], pa.int64()).cast(pa.decimal256(40, 2)), ["1.00", None]),
    "interval": (
        pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
        ["MonthDayNano(months=1, days=2, nanoseconds=3)", None],
    ),
}


def test_a_column_of_any_type_is_read() -> None:
    columns = {"messages": [TURNS, TURNS], **{name: column for name, (column, _) in COLUMNS.items()}}
    write_arrow(Path("a.arrow"), pa.table(columns))
    samples, rejects = _ingest(Path("a.arrow"), "arrow")
    assert rejects == []
    found = [json.loads(sample["metadata"]) for sample in samples]
    assert {name: [row[name] for row in found] for name in COLUMNS} == {
        name: expected for name, (_, expected) in COLUMNS.items()
    }


def test_structs_in_batches_of_any_length_are_read() -> None:
    table = pa.table({"messages": [TURNS] * 9000, "inner": [{"a": {"b": n}} for n in range(9000)]})
    with pa.ipc.new_file("a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    samples, rejects = _ingest(Path("a.arrow"), "arrow")
    assert ([json.loads(row["metadata"])["inner"]["a"]["b"] for row in samples], rejects) == (list(range(9000)), [])


def test_sizes_are_no_less_than_what_is_decoded() -> None:
    used_often = pa.DictionaryArray.from_arrays(pa.array([0, 0, None, 1], pa.int8()), pa.array(["x" * 1000, "y"]))
    run = pa.RunEndEncodedArray.from_arrays(pa.array([9], pa.int32()), pa.array(["x" * 1000]))
    views = pa.array(["x" * 1000, "y", None, "z"], pa.string_view())
    for array in (used_often, used_often.slice(1, 2), run, run.slice(3, 2), views, views.slice(1, 2)):
        # Offsets are not counted, each value for itself is.
        texts = sum(len(text or "") for text in plain(array).to_pylist())
        assert texts + 3 * len(array) <= decoded_bytes(array) <= texts + 12 * len(array)
    lists = pa.ListArray.from_arrays(pa.array([0, 10**9], pa.int32()), pa.nulls(10**9))
    assert decoded_bytes(lists) > 10**9
    assert decoded_bytes(pa.StructArray.from_arrays([lists], ["a"])) > 10**9


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_table_with_any_bytes_changed_is_rows_or_is_refused(kind: str) -> None:
    """What is read of some of these without a process of its own ends the run (SIGSEGV)."""
    columns = {"messages": [TURNS] * 50, "l": [[["a"], ["b", "c"]]] * 50, "n": list(range(50))}
    table = pa.table(columns | {"d": pa.array(["x", "y"] * 25).dictionary_encode()})
    write_arrow(Path("good"), table) if kind == "arrow" else pq.write_table(table, "good")
    good, random = Path("good").read_bytes(), Random(1)
    refused = 0
    with RowFiles(Limits(1 << 30, MIB)) as files:
        for _ in range(150):
            content = bytearray(good)
            for _ in range(random.choice((1, 4, 16))):
                place = random.randrange(len(content) - 4)
                content[place : place + 4] = random.choice((b"\xff\xff\xff\x7f", b"\0\0\0\x80", random.randbytes(4)))
            Path("bad").write_bytes(content)
            try:
                assert all(len(slab.rows.to_pylist()) <= 50 for slab in files.slabs(Path("bad"), kind))
            except UserError as error:
                refused += str(error).startswith(f"'bad' cannot be read as {kind}: ")
        Path("bad").write_bytes(good)
        assert sum(slab.rows.num_rows for slab in files.slabs(Path("bad"), kind)) == 50
    assert refused > 75

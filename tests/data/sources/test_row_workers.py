"""Rows read in several processes are those that one process reads, and those that Daft's workers read."""

from __future__ import annotations

import json
import os
import signal
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_pipeline.config import DataEngineConfig, DatasetSource, IngestConfig
from qvl_pipeline.data.sources import row_workers
from qvl_pipeline.data.sources.row_workers import RowWorkers, by_daft
from qvl_pipeline.data.sources.rows import RowReader
from qvl_pipeline.errors import UserError

TURNS = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "A cat"}]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def declared(folder: Path, data_type: str) -> tuple[DatasetSource, IngestConfig]:
    source = {"name": "rows", "path": str(folder), "data_folder": str(folder), "data_type": data_type}
    config = IngestConfig(datasets=[source], cache_folder=str(folder / "cache"))
    return config.datasets[0], config


def json_rows() -> pa.Table:
    rows = [json.dumps({"messages": TURNS, "images": [f"{n}.png"], "id": n, "ä": [None, 1.5]}) for n in range(40)]
    rows[3] = rows[3][:-4]
    rows[7] = json.dumps({"messages": TURNS, "images": ["../out.png"]})
    problems = [None] * 39 + ["it was cut off"]
    return pa.table({"record": [row.encode() for row in rows], "problem": pa.array(problems, pa.string())})


def table_rows() -> pa.Table:
    """Columns of a table, as a file of Parquet has them: of many types."""
    columns: dict[str, Any] = {
        "messages": [TURNS] * 20,
        "images": [[f"{n}.png"] for n in range(20)],
        "when": pa.array([datetime(2026, 1, 1, n) for n in range(20)], pa.timestamp("ms")),
        "price": pa.array([Decimal("1.50")] * 20, pa.decimal128(9, 2)),
        "small": pa.array(range(20), pa.uint8()),
        "half": pa.array([0.1] * 20, pa.float32()),
        "raw": [b"\0\1"] * 20,
        "deep": [{"a": {"b": [n, None]}} for n in range(20)],
        "map": pa.array([[("k", n)] for n in range(20)], pa.map_(pa.string(), pa.int64())),
    }
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    (batch,) = pq.read_table(pa.BufferReader(sink.getvalue())).combine_chunks().to_batches()
    return pa.table({"record": batch.to_struct_array(), "problem": pa.nulls(20, pa.string())})


@pytest.mark.parametrize(("data_type", "make"), [("jsonl", json_rows), ("parquet", table_rows)])
def test_pool_one_process_and_daft_read_the_same(data_type: str, make: Any, tmp_path: Path) -> None:
    source, config = declared(tmp_path, data_type)
    rows = make()
    read = {}
    for batch_rows in (6, 1000):
        with RowWorkers(DataEngineConfig(batch_rows=batch_rows)) as workers:
            read[batch_rows] = workers.start(source, config, "train", rows, "rows")()
            assert (workers._pool is not None) == (batch_rows == 6)
    pieces = rows.combine_chunks().to_batches()
    before = by_daft(RowReader(source, config), "train", pieces, 1000, "rows")
    assert read[6].num_rows == len(rows)
    assert read[6].equals(read[1000])
    assert read[6].equals(before.cast(read[6].schema))
    assert sum(read[6]["rule"].is_valid().to_pylist()) == (3 if data_type == "jsonl" else 0)


def test_a_process_that_is_killed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = declared(tmp_path, "jsonl")
    monkeypatch.setattr(row_workers, "_read_there", _killed)
    with RowWorkers(DataEngineConfig(batch_rows=10)) as workers:
        wait = workers.start(source, config, None, json_rows(), "rows.jsonl")
        with pytest.raises(UserError, match=r"a process that reads 'rows.jsonl' was ended from outside"):
            wait()


def _killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)

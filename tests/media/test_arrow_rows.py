from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qvl_pipeline.media.arrow_rows import TokenizedSamples

MEDIUM = {"type": "video", "key": "a.mp4", "grid_t": 2, "grid_h": 4, "grid_w": 4, "seconds_per_grid": 1.5}
ROWS: list[dict[str, Any]] = [
    {
        "sample_id": f"source/{number}",
        "length": number + 3,
        "input_ids": list(range(number + 3)),
        "label_spans": [{"start": 1, "end": 2}, {"start": number + 2, "end": number + 3}],
        "media": [MEDIUM] * (number % 3),
    }
    for number in range(23)
]
SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32())])
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("length", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("label_spans", pa.list_(SPAN)),
        ("media", pa.list_(pa.struct([(name, pa.array([value]).type) for name, value in MEDIUM.items()]))),
    ]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of batches of different sizes."""
    path = tmp_path / "tokenized.arrow"
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for start, end in ((0, 7), (7, 8), (8, 20), (20, 23)):
            writer.write_batch(pa.RecordBatch.from_pylist(ROWS[start:end], schema=SCHEMA))
    return path


def test_every_row_is_read_back_from_any_place(path: Path) -> None:
    samples = TokenizedSamples(path)
    assert len(samples) == 23
    for index in np.random.default_rng(0).permutation(23).tolist():
        row, expected = samples.row(index), ROWS[index]
        assert row["input_ids"].dtype == np.int32
        assert row["input_ids"].tolist() == expected["input_ids"]
        assert row["label_spans"].tolist() == [[span["start"], span["end"]] for span in expected["label_spans"]]
        for name in ("sample_id", "length", "media"):
            assert row[name] == expected[name]


def test_ids_may_be_changed_without_changing_the_file(path: Path) -> None:
    samples = TokenizedSamples(path)
    samples.row(3)["input_ids"][:] = -1
    assert samples.row(3)["input_ids"].tolist() == ROWS[3]["input_ids"]


@pytest.mark.parametrize("index", [-1, 23])
def test_a_row_that_is_not_there_is_an_error(path: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"row {index} of .*: it has 23 rows"):
        TokenizedSamples(path).row(index)


def test_columns_are_read_in_row_order(path: Path) -> None:
    table = TokenizedSamples(path).columns(["length", "sample_id"])
    assert table.to_pydict() == {name: [row[name] for row in ROWS] for name in ("length", "sample_id")}


def test_opening_and_reading_a_row_does_not_load_the_file(path: Path) -> None:
    before = pa.total_allocated_bytes()
    samples = TokenizedSamples(path)
    samples.row(5)
    assert pa.total_allocated_bytes() - before < path.stat().st_size / 10


def test_a_reader_can_be_sent_to_another_process(path: Path) -> None:
    samples = pickle.loads(pickle.dumps(TokenizedSamples(path)))
    assert samples.row(9)["sample_id"] == "source/9"

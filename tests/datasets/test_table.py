"""Tables keep the types of their contract, whatever the rows hold."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from kedro.io import DatasetError

from qvl_pipeline.data.tables import MEDIA_INDEX, SAMPLES
from qvl_pipeline.datasets import TableDataset

SAMPLE = dict.fromkeys(SAMPLES.names, "x") | {
    "row": 1,
    "media": [{"type": "image", "path": "a.png", "start": None, "end": None}],
}


def test_column_without_a_value_keeps_its_type(tmp_path: Path) -> None:
    dataset = TableDataset(
        filepath=str(tmp_path / "deep" / "samples.parquet"), schema="qvl_pipeline.data.tables.SAMPLES"
    )
    dataset.save(pd.DataFrame([SAMPLE]))
    assert pq.read_schema(tmp_path / "deep" / "samples.parquet") == SAMPLES
    assert dataset.load()["media"][0].tolist() == SAMPLE["media"]


def test_a_streamed_table_is_loaded_without_reading_it(tmp_path: Path) -> None:
    dataset = TableDataset(
        filepath=str(tmp_path / "s.parquet"), schema="qvl_pipeline.data.tables.SAMPLES", streamed=True
    )
    dataset.save(pd.DataFrame([SAMPLE, SAMPLE]))
    table = dataset.load()
    assert table.schema_arrow == SAMPLES
    assert [batch.to_pylist() for batch in table.iter_batches(1)] == [[SAMPLE], [SAMPLE]]


def test_nullable_integers_stay_integers(tmp_path: Path) -> None:
    dataset = TableDataset(filepath=str(tmp_path / "i.parquet"), schema="qvl_pipeline.data.tables.MEDIA_INDEX")
    row = dict.fromkeys(MEDIA_INDEX.names)
    dataset.save(pd.DataFrame([row, row]).assign(width=pd.array([2**53 + 1, None], dtype="Int64")))
    assert dataset.load()["width"][0] == 2**53 + 1


def test_wrong_columns_are_refused_and_the_old_table_stays(tmp_path: Path) -> None:
    dataset = TableDataset(filepath=str(tmp_path / "s.parquet"), schema="qvl_pipeline.data.tables.SAMPLES")
    dataset.save(pd.DataFrame([SAMPLE]))
    with pytest.raises(DatasetError, match="messages"):
        dataset.save(pd.DataFrame([SAMPLE]).drop(columns="messages"))
    assert len(dataset.load()) == 1


def test_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        TableDataset(filepath=str(tmp_path / "no.parquet"), schema="qvl_pipeline.data.tables.SAMPLES").load()

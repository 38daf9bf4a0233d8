from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kedro_viz.models.flowchart.node_metadata import DataNodeMetadata
from kedro_viz.models.flowchart.nodes import GraphNode

from qvl_pipeline.datasets import CurvesDataset, PageDataset, TableDataset


def shown(dataset: object, metadata: dict) -> DataNodeMetadata:
    """Return what Kedro-Viz has to show of a dataset."""
    dataset.metadata = {"kedro-viz": metadata}
    node = GraphNode.create_data_node("entry", "entry", None, set(), dataset, set())
    return DataNodeMetadata(data_node=node)


def test_a_page_is_shown_as_a_page(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<h1>Hello</h1>")
    metadata = shown(PageDataset(filepath=str(tmp_path / "a.html")), {"layer": "reporting"})
    assert (metadata.preview_type, metadata.preview) == ("HTMLPreview", "<h1>Hello</h1>")


def test_metrics_are_shown_as_curves_without_the_steps_that_have_none(tmp_path: Path) -> None:
    dataset = CurvesDataset(filepath=str(tmp_path / "a.csv"), save_args={"index": False})
    dataset.save(pd.DataFrame({"step": [5, 10], "loss": [2.0, 1.0], "eval_loss": [None, 1.5]}))
    metadata = shown(dataset, {"preview_args": {"x": "step", "y": ["loss", "eval_loss", "other"]}})
    assert metadata.preview_type == "PlotlyPreview"
    curves = {curve["name"]: (curve["x"], curve["y"]) for curve in metadata.preview["data"]}
    assert curves == {"loss": ([5, 10], [2.0, 1.0]), "eval_loss": ([10], [1.5])}


SCHEMA = pa.schema([("sample_id", pa.string()), ("media", pa.list_(pa.string()))])


@pytest.mark.parametrize(("rows", "nrows"), [(30, 10), (3, 10), (0, 10)])
def test_the_first_rows_of_a_table_are_shown(tmp_path: Path, rows: int, nrows: int) -> None:
    table = pa.table({"sample_id": [f"a/{i}" for i in range(rows)], "media": [["b.png"]] * rows}, schema=SCHEMA)
    pq.write_table(table, tmp_path / "a.parquet")
    metadata = shown(TableDataset(filepath=str(tmp_path / "a.parquet"), schema=f"{__name__}.SCHEMA"), {})
    assert metadata.preview_type == "TablePreview"
    assert metadata.preview["columns"] == ["sample_id", "media"]
    assert metadata.preview["data"] == [[f"a/{i}", "['b.png']"] for i in range(min(rows, nrows))]

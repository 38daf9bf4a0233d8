"""Pages and curves that appear whole, with previews in Kedro-Viz."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from kedro.io import AbstractDataset, DatasetError
from kedro_datasets.pandas import CSVDataset

from qvl_pipeline.datasets.another import OfAnotherNode
from qvl_pipeline.storage.whole import whole, write_whole

if TYPE_CHECKING:
    from kedro_datasets._typing import HTMLPreview, PlotlyPreview


class PageDataset(AbstractDataset[str, str]):
    """An HTML page, shown as such by Kedro-Viz."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Create the dataset.

        Args:
            filepath: Path of the file.
            metadata: Free-form metadata, read by Kedro plugins.
        """
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> str:
        """Load the page."""
        if not self._exists():
            raise DatasetError(f"{self._filepath} does not exist")
        return self._filepath.read_text(encoding="utf-8")

    def save(self, data: str) -> None:
        """Write the page, unless another node of the job does."""
        if not isinstance(data, OfAnotherNode):
            write_whole(self._filepath, data)

    def preview(self) -> HTMLPreview:
        """Return the page."""
        return self.load()

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class CurvesDataset(CSVDataset):
    """A CSV table of which Kedro-Viz plots columns."""

    def save(self, data: pd.DataFrame) -> None:
        """Write the table."""
        with whole(Path(self._filepath)) as partial:
            data.to_csv(partial, **self._save_args)
        self._invalidate_cache()

    def preview(self, x: str, y: list[str]) -> PlotlyPreview:
        """Return a plot of the columns `y`, as far as the table has them, over the column `x`."""
        table = self.load()
        curves: list[dict[str, Any]] = [_curve(table, x, column) for column in y if column in table]
        layout = {"xaxis": {"title": {"text": x}}, "yaxis": {"rangemode": "tozero"}, "showlegend": True}
        return {"data": curves, "layout": layout}


def _curve(table: pd.DataFrame, x: str, column: str) -> dict[str, Any]:
    # Not every row has every number: the eval loss is there at some steps only.
    rows = table[[x, column]].dropna()
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": column,
        "x": rows[x].tolist(),
        "y": rows[column].tolist(),
    }

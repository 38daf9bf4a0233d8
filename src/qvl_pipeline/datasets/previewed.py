"""Datasets of kedro-datasets with previews in Kedro-Viz: pages as pages, tables of numbers by step as curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from kedro_datasets.pandas import CSVDataset
from kedro_datasets.text import TextDataset

if TYPE_CHECKING:
    from kedro_datasets._typing import HTMLPreview, PlotlyPreview


class PageDataset(TextDataset):
    """An HTML page, shown as such by Kedro-Viz."""

    def preview(self) -> HTMLPreview:
        """Return the page."""
        return self.load()


class CurvesDataset(CSVDataset):
    """A CSV table of which Kedro-Viz plots columns."""

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

"""The evaluated samples to browse: a page that filters, and parts with samples, which it loads when they are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qvl_pipeline.reports.evaluation.answers import Media, card, is_right
from qvl_pipeline.reports.page import render

# Samples of a part: few are loaded in vain, and a thousand samples are fifty files.
PART = 20


def write_samples_page(folder: Path, *, title: str, predictions: pd.DataFrame, media: Media, most: int) -> None:
    """Write `index.html` and its parts, `part-00000.js` and so on: scripts, for a page in a file may load nothing else.

    They make no request to anywhere else, and show text of the data escaped. Samples are in the order of their kinds,
    wrong ones first and then by source, so that what a filter leaves is in few parts.

    Args:
        folder: Folder to make.
        title: Heading.
        predictions: One row for every evaluated sample.
        media: Pictures of a sample, by its `sample_id`.
        most: Samples shown; of more, so many are taken evenly of all kinds, sources, and right and wrong ones.
    """
    predictions = predictions[predictions["trained_answer"].notna()]  # a server may have left out some
    ordered = predictions.assign(right=is_right(predictions)).sort_values(["kind", "right", "source"], kind="stable")
    if len(ordered) > most:
        ordered = ordered.iloc[np.linspace(0, len(ordered) - 1, most).round().astype(int)]
    folder.mkdir(parents=True)
    rows = ordered.to_dict("records")
    for number, start in enumerate(range(0, len(rows), PART)):
        cards = [render("sample", card=card(row, media)) for row in rows[start : start + PART]]
        (folder / f"part-{number:05d}.js").write_text(f"part({number}, {json.dumps(cards)})\n", encoding="utf-8")
    page = render(
        "samples",
        title=title,
        total=len(predictions),
        index=_inline({"part": PART, **_index(ordered)}),
        kinds=sorted(set(ordered["kind"])),
        sources=sorted(set(ordered["source"])),
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def _index(ordered: pd.DataFrame) -> dict[str, Any]:
    """Return what the filters need of each sample: names once, and their numbers."""
    columns = {name: pd.Categorical(ordered[name], sorted(set(ordered[name]))) for name in ("kind", "source")}
    names = {f"{name}s": column.categories.tolist() for name, column in columns.items()}
    codes = {name: column.codes.tolist() for name, column in columns.items()}
    return {**names, **codes, "right": ordered["right"].astype(int).tolist()}


def _inline(values: dict[str, Any]) -> str:
    """Write JSON that no text of the data can end the script of, or its comment."""
    return json.dumps(values).replace("<", "\\u003c")

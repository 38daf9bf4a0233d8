"""The validation page: what a dataset holds and what is wrong with it, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

BINS = 12
OFFENDERS_EACH = 3


def render_validation(
    *,
    dataset: str,
    report: dict[str, Any],
    samples: pd.DataFrame,
    rejects: pd.DataFrame,
    quarantine: pd.DataFrame,
    warnings: pd.DataFrame,
    media_index: pd.DataFrame,
    thumbnail: Callable[[str, str], str | None],
) -> str:
    """Write the page. It makes no request to anywhere and shows text of the data escaped.

    Args:
        dataset: Name of the dataset.
        report: `counts`, `rules` and `warnings`.
        samples: All samples that could be read.
        rejects: Rows that could not be read.
        quarantine: Samples that broke a rule.
        warnings: Valid samples that broke a rule which only warns.
        media_index: Every media file as probed.
        thumbnail: Picture of a media file as a `data:` URI, by its type and path; `None` where it cannot be decoded.

    Returns:
        HTML.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    ids = rejects["source"].astype(str) + "/" + rejects["row"].astype(str)
    return environment.get_template("validation.html.j2").render(
        dataset=dataset,
        counts=report["counts"],
        histograms=_histograms(samples, media_index),
        by_source=_by_source(samples, rejects, quarantine),
        lost=_offenders(pd.concat([rejects.assign(sample_id=ids), quarantine]), samples, thumbnail),
        warned=_offenders(warnings, samples, thumbnail),
        offenders_each=OFFENDERS_EACH,
    )


def _histograms(samples: pd.DataFrame, media_index: pd.DataFrame) -> list[dict[str, Any]]:
    characters = [
        sum(len(item.get("text", "")) for turn in orjson.loads(text) for item in turn["content"])
        for text in samples["messages"]
    ]
    images = [sum(use["type"] == "image" for use in uses) for uses in samples["media"]]
    clips = media_index[media_index["type"] == "video"]
    pixels = (media_index["width"].astype(float) * media_index["height"].astype(float)).dropna()
    wanted = [
        ("Text of a sample", "characters", characters),
        ("Images of a sample", "images", images),
        ("Resolution of a file", "thousand pixels", pixels / 1000),
        ("Duration of a clip", "seconds", clips["duration_s"].astype(float).dropna()),
        ("Frame rate of a clip", "frames a second", clips["fps"].astype(float).dropna()),
    ]
    return [{"title": title, "unit": unit, "bins": bins} for title, unit, values in wanted if (bins := _bins(values))]


def _bins(values: Any) -> list[dict[str, Any]]:
    """Count values in bins: one for each of few values, else of equal width, wider ones where they spread far."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return []
    distinct = np.unique(array)
    if len(distinct) <= BINS:
        counts = [(f"{value:g}", int((array == value).sum())) for value in distinct]
    else:
        low, high = max(distinct[0], 1e-9), distinct[-1]
        spread = distinct[0] > 0 and high / low > 50
        edges = np.geomspace(low, high, BINS + 1) if spread else np.linspace(distinct[0], high, BINS + 1)
        found, _ = np.histogram(array, np.concatenate([edges[:-1], [np.inf]]))
        counts = [(f"{a:.3g} to {b:.3g}", int(n)) for a, b, n in zip(edges[:-1], edges[1:], found, strict=True)]
    most = max(n for _, n in counts)
    return [{"label": label, "n": n, "share": n / most} for label, n in counts]


def _by_source(samples: pd.DataFrame, rejects: pd.DataFrame, quarantine: pd.DataFrame) -> list[dict[str, Any]]:
    tables = {"read": samples, "rejected": rejects, "quarantined": quarantine}
    counts = pd.DataFrame({name: table["source"].value_counts() for name, table in tables.items()})
    counts = counts.fillna(0).astype(int).sort_index()
    counts["eval"] = samples[samples["split"] == "eval"]["source"].value_counts().reindex(counts.index).fillna(0)
    return [{"source": str(source), **row} for source, row in counts.astype(int).iterrows()]


def _offenders(
    broken: pd.DataFrame, samples: pd.DataFrame, thumbnail: Callable[[str, str], str | None]
) -> list[dict[str, Any]]:
    """The rules that were broken, the most broken first, each with its first rows and their media."""
    media = dict(zip(samples["sample_id"], samples["media"], strict=True))
    groups = []
    for rule, rows in broken.groupby("rule", sort=True):
        shown = [
            {
                "sample_id": row["sample_id"],
                "detail": row["detail"],
                "pictures": [
                    uri
                    for use in list(media.get(row["sample_id"], []))[:4]
                    if (uri := thumbnail(use["type"], use["path"]))
                ],
            }
            for row in rows.head(OFFENDERS_EACH).to_dict("records")
        ]
        groups.append({"rule": rule, "n": len(rows), "rows": shown})
    return sorted(groups, key=lambda group: (-group["n"], group["rule"]))

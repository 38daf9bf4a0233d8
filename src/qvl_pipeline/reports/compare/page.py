"""The comparison of trainings as one self-contained HTML page, the same bytes for the same runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pandas as pd

from qvl_pipeline.kinds import OVERALL
from qvl_pipeline.reports.compare.differing import grouped, rows_by_name
from qvl_pipeline.reports.compare.tables import EXAMPLES, SAME_SAMPLE, Comparison
from qvl_pipeline.reports.evaluation.answers import RIGHT
from qvl_pipeline.reports.page import render
from qvl_pipeline.reports.plots import WIDTH, Panel, overlay

# More of them are folded: the curves are not to be a screen away.
FEW_SOURCES = 6
CURVES = {
    "train/loss": ("Training loss", 240),
    "train/eval_loss": ("Eval loss", 160),
    "train/learning_rate": ("Learning rate", 90),
    "train/tokens_per_second": ("Tokens per second", 90),
}


def render_comparison(comparison: Comparison) -> str:
    """Write the page; it makes no request to anywhere, and shows text of the data escaped."""
    names = list(comparison.runs.index)
    colours = {name: f"run{index}" for index, name in enumerate(names)}
    return render(
        "compare",
        runs=[
            {
                "name": name,
                "colour": colours[name],
                "run_id": row.run_id,
                "started": _date(row.started),
                "scores": _overall(comparison, name),
            }
            for name, row in comparison.runs.iterrows()
        ],
        few_sources=FEW_SOURCES,
        differing=grouped(comparison.parameters),
        panels=_panels(comparison, colours),
        plot_width=WIDTH,
        kinds=_kinds(comparison, colours),
        intervals_missing=[name for name in names if _has_no_intervals(comparison.scores, name)],
        gains_missing=_without_gain(comparison, names),
        figures=rows_by_name(comparison.figures.map(_figure)),
        versions=rows_by_name(comparison.versions),
        examples=_examples(comparison, names),
        most_examples=EXAMPLES,
        disagreeing=comparison.disagreeing,
        common=comparison.common,
    )


def _overall(comparison: Comparison, name: str) -> list[dict[str, Any]]:
    """Return the scores of all samples of a training, by metric, with its gain over the first training."""
    scores, gains = (
        table[(table["run"] == name) & (table["kind"] == OVERALL)]
        for table in (comparison.scores, comparison.differences)
    )
    by_metric = gains.set_index("metric").to_dict("index")
    return [{**row, "gain": by_metric.get(row["metric"])} for row in scores.to_dict("records")]


def _panels(comparison: Comparison, colours: dict[str, str]) -> list[Panel]:
    panels = []
    for metric, (title, height) in CURVES.items():
        rows = comparison.curves[comparison.curves["metric"] == metric]
        curves = {colours[name]: part.set_index("step")["value"] for name, part in rows.groupby("run", sort=False)}
        if drawn := overlay(title, height, curves):
            panels.append(drawn)
    return panels


def _kinds(comparison: Comparison, colours: dict[str, str]) -> list[dict[str, Any]]:
    """One entry for every kind and metric, those of all samples last, with a row for every run."""
    differences = comparison.differences.set_index(["run", "kind", "metric"])
    groups = comparison.scores.groupby(["kind", "metric"], sort=True)
    entries = []
    for (kind, metric), scores in sorted(groups, key=lambda group: group[0][0] == OVERALL):
        rows = [
            {
                **row,
                "colour": colours[row["run"]],
                "gain": differences.loc[key].to_dict()
                if (key := (row["run"], kind, metric)) in differences.index
                else None,
            }
            for row in scores.to_dict("records")
        ]
        entries.append({"kind": "all samples" if kind == OVERALL else kind, "metric": metric, "rows": rows})
    return entries


def _has_no_intervals(scores: pd.DataFrame, name: str) -> bool:
    of_run = scores[scores["run"] == name]
    return bool(len(of_run)) and of_run["low"].isna().all()


def _without_gain(comparison: Comparison, names: list[str]) -> list[str]:
    """Return the trainings whose answers are there, as are those of the first, but to none of the same samples."""
    scores = comparison.scores.dropna(subset="low")
    answered, compared = set(scores["run"]), set(comparison.differences["run"])
    return [name for name in names[1:] if {names[0], name} <= answered and name not in compared]


def _examples(comparison: Comparison, names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(SAME_SAMPLE, index, strict=True)),
            "answers": [(row[name, "answer"], float(row[name, "score"]) >= RIGHT) for name in names],
        }
        for index, row in comparison.disagreements.iterrows()
    ]


def _figure(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "n/a"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def _date(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")

"""The figures at the head of a report: those that mean something of these data, and what has to be said of them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qvl_pipeline.intervals import Score
from qvl_pipeline.kinds import OVERALL
from qvl_pipeline.reports.page import count, percent

_NAMES = {"trained": "Trained model", "base": "Base model"}
_SHARES = {"exact_match": "exact matches", "multiple_choice": "right choices", "relaxed_accuracy": "right answers"}
_NAMED = 5


def headline_tiles(
    kinds: list[dict[str, Any]], metrics: dict[str, Any], predictions: pd.DataFrame
) -> list[dict[str, str]]:
    """Return the tiles of the trained and the untrained model, and of the gain.

    The measure is that of most samples. ROUGE-L of free text that nobody asked for says little: where there is nothing
    else, it is perplexity.

    Args:
        kinds: Rows of the table of kinds, those of all samples with `total`.
        metrics: Metrics of the evaluated models.
        predictions: Predictions of the evaluated models.
    """
    weak = _chosen_for_free_text(predictions)
    totals = [row for row in kinds if row["total"]]
    told = [row for row in totals if row["metric"] not in weak]
    if not told and "loss" in metrics["trained"][OVERALL]:
        return _loss_tiles(metrics, totals)
    row = max(told or totals, key=lambda row: row["trained"].n)
    models = [name for name in _NAMES if row[name]]
    tiles = [_score_tile(name, row[name], row["metric"]) for name in models]
    if "gain" in row:
        tiles.append({"role": "gain", "name": "Gain", "value": row["gain"], "detail": "percentage points"})
    return tiles


def _loss_tiles(metrics: dict[str, Any], totals: list[dict[str, Any]]) -> list[dict[str, str]]:
    overall = {name: metrics[name][OVERALL] for name in _NAMES if "loss" in metrics.get(name, {}).get(OVERALL, {})}
    tiles = []
    for name, figures in overall.items():
        scores = ", ".join(f"{row['metric']} {percent(row[name].rate)}" for row in totals)
        detail = f"perplexity; loss {figures['loss']:.3f}, {scores}"
        tiles.append({"role": name, "name": _NAMES[name], "value": f"{figures['perplexity']:.4g}", "detail": detail})
    if len(overall) == len(_NAMES):
        gain = overall["trained"]["loss"] - overall["base"]["loss"]
        tiles.append({"role": "gain", "name": "Change", "value": f"{gain:+.3f}", "detail": "of the loss, nats a token"})
    return tiles


def _score_tile(role: str, score: Score, metric: str) -> dict[str, str]:
    right = round(score.rate * score.n)
    of = f"{count(right)} of {count(score.n)} {_SHARES[metric]}" if metric in _SHARES else f"{metric}, n = {score.n}"
    return {"role": role, "name": _NAMES[role], "value": percent(score.rate), "detail": of}


def _chosen_for_free_text(predictions: pd.DataFrame) -> set[str]:
    if "task_from" not in predictions:
        return set()
    free = predictions[predictions["task"] == "rouge_l"]
    return {"rouge_l"} if len(free) and free["task_from"].notna().all() else set()


def evaluation_notes(predictions: pd.DataFrame) -> list[str]:
    """Say which tasks were chosen by the answers, and which samples a server left without one."""
    notes = []
    if "task_from" in predictions:
        chosen = predictions[predictions["task_from"].notna()]
        for (task, why), rows in chosen.groupby(["task", "task_from"], sort=True):
            names = ", ".join(sorted(rows["source"].unique()))
            notes.append(
                f"The rows of {names} name no task: {task}, by their {why}. The column task or evaluate.task_by_source "
                "say another."
            )
    for column in (name for name in predictions if name.endswith("_failure")):
        failed = predictions[predictions[column].notna()]
        if len(failed):
            names = ", ".join(failed["sample_id"].head(_NAMED)) + (", …" if len(failed) > _NAMED else "")
            notes.append(
                f"{count(len(failed))} of {count(len(predictions))} samples have no answer of the server of "
                f"'{column.removesuffix('_failure')}', and are in no score of it: {names} ({failed[column].iloc[0]})."
            )
    return notes

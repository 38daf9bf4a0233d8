"""What was answered: wrong and right answers of every kind, and which short answers are taken for which others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from qvl_pipeline.evaluation.metrics import references, right_answers
from qvl_pipeline.reports.thumbnail import Thumbnail
from qvl_pipeline.tokens.thoughts import without_thoughts

WRONG_EACH, RIGHT_EACH = 4, 2
RIGHT = 0.5  # an answer with at least this score is shown as right
# Tasks of which an answer is right or wrong; of others, the score itself is shown.
YES_OR_NO = (
    *("exact_match", "multiple_choice", "relaxed_accuracy", "grounding"),
    *("mmmu", "mathvista", "ai2d", "realworldqa", "option_letter", "mlvu"),
)
# Answers that are compared with each other are few, short, and of tasks that ask for one of them.
OF_A_CHOICE = ("exact_match", "multiple_choice")
MOST_CLASSES, LONGEST_CLASS, FEWEST_EACH, MISTAKES = 12, 24, 3, 8
OTHER = "another answer"
ANSWER, NAMES = "_answer", {"trained": "Trained", "base": "Base"}

Media = Callable[[str], list[list[Thumbnail]]]


def is_right(predictions: pd.DataFrame) -> pd.Series:
    """Tell which answers of the trained model are shown as right."""
    return predictions["trained_score"].astype(float) >= RIGHT


def gallery(predictions: pd.DataFrame, media: Media) -> list[dict[str, Any]]:
    """Choose answers of every kind to look at: the worst ones, and some right ones.

    Args:
        predictions: One row for every evaluated sample.
        media: Pictures of a sample, by its `sample_id`.

    Returns:
        Of every kind its name, `n`, the number of `right` answers, and `wrong` and `fine`, lists of cards (`card`).
        Wrong answers with the lowest score come first; of equal ones, those whose expected answer the model finds least
        likely.
    """
    groups = []
    for kind, rows in predictions.groupby("kind", sort=True):
        right = is_right(rows)
        order = rows.assign(score=rows["trained_score"].astype(float), loss=-rows["trained_loss"].astype(float))
        worst = order[~right].sort_values(["score", "loss"], kind="stable").drop(columns=["score", "loss"])
        chosen = {"wrong": worst.head(WRONG_EACH), "fine": rows[right].head(RIGHT_EACH)}
        cards = {name: [card(row, media) for row in of.to_dict("records")] for name, of in chosen.items()}
        groups.append({"kind": kind, "n": len(rows), "right": int(right.sum()), **cards})
    return groups


def card(row: dict[str, Any], media: Media) -> dict[str, Any]:
    """Return what is shown of one sample: its media, question, expected answer, and each model's answer and score.

    The trained model's comes first. A model without an answer is left out.
    """
    answered = [name.removesuffix(ANSWER) for name in row if name.endswith(ANSWER) and not pd.isna(row[name])]
    return {
        "sample_id": row["sample_id"],
        "source": row["source"],
        "question": row["question"],
        "expected": " | ".join(right_answers(row["expected"], row["task"])),
        "media": media(row["sample_id"]),
        "answers": [
            {
                "model": NAMES.get(model, model),
                "text": row[f"{model}{ANSWER}"],
                "right": float(row[f"{model}_score"]) >= RIGHT,
                "score": None if row["task"] in YES_OR_NO else f"{row['task']} {float(row[f'{model}_score']):.2f}",
            }
            for model in sorted(answered, key=lambda name: (name != "trained", name != "base"))
        ],
    }


def confusion(predictions: pd.DataFrame) -> dict[str, Any] | None:
    """Count which short answers are given where which are expected.

    Args:
        predictions: One row for every evaluated sample.

    Returns:
        `labels` of the columns, `rows` (`label`, `n`, and `cells`: `n`, `share` of the row, whether `right`), the most
        frequent `mistakes` (`expected`, `answered`, `n`), `shown` of `total` samples. `None` where there are no two
        answers that are each expected a few times.
    """
    asked = predictions[predictions["task"].isin(OF_A_CHOICE)]
    pairs = pd.DataFrame(
        {
            "expected": [_normalised(references(text)[0]) for text in asked["expected"]],
            "answered": [_normalised(without_thoughts(text)) for text in asked["trained_answer"]],
            "right": is_right(asked).to_numpy(),
        }
    )
    pairs = pairs[pairs["expected"].str.len().between(1, LONGEST_CLASS)] if len(pairs) else pairs
    counts = pairs["expected"].value_counts()
    labels = sorted(counts[counts >= FEWEST_EACH].head(MOST_CLASSES).index, key=lambda label: (len(label), label))
    if len(labels) < 2:
        return None
    shown = pairs[pairs["expected"].isin(labels)]
    wrong = shown[~shown["right"]]
    # What the metric takes for right is right, however it is put.
    given = shown["expected"].where(shown["right"], shown["answered"].where(shown["answered"].isin(labels), OTHER))
    columns = [*labels, OTHER] if (given == OTHER).any() else labels
    table = pd.crosstab(shown["expected"], given).reindex(index=labels, columns=columns, fill_value=0)
    mistakes = wrong.groupby(["expected", "answered"]).size().sort_values(ascending=False, kind="stable").head(MISTAKES)
    return {
        "labels": columns,
        "rows": [_confusion_row(label, row) for label, row in table.iterrows()],
        "mistakes": [{"expected": pair[0], "answered": pair[1], "n": int(n)} for pair, n in mistakes.items()],
        "shown": len(shown),
        "total": len(predictions),
    }


def _confusion_row(label: str, row: pd.Series) -> dict[str, Any]:
    total = int(row.sum())
    cells = [{"n": int(n), "share": n / total, "right": column == label} for column, n in row.items()]
    return {"label": label, "n": total, "cells": cells}


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())

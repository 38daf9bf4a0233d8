"""Metrics of generated answers: one function per task name, averaged by sample kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from qvl_pipeline.errors import UserError


def exact_match(answer: str, expected: str) -> bool:
    """Tell whether two texts are the same up to case and white space.

    Args:
        answer: Generated text.
        expected: Text of the dataset.

    Returns:
        Whether both are equal after stripping, case folding (`str.casefold`) and turning every run of white space into
        one space. Punctuation, articles and number formats count.
    """
    return _normalise(answer) == _normalise(expected)


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


METRICS: dict[str, Callable[[str, str], bool]] = {"exact_match": exact_match}
OVERALL = "overall"


def check_scorable(samples: pd.DataFrame) -> None:
    """Refuse samples that could not be scored, before anything is generated.

    Args:
        samples: Columns `sample_id`, `kind` and `task`.

    Raises:
        UserError: There is no sample, a task has no metric, or a sample kind is called `overall`.
    """
    if samples.empty:
        raise UserError(
            "the eval split is empty, so there is nothing to evaluate: give a source 'split: eval' or its rows a "
            "column 'split', or set 'eval_fraction' of 'ingest'; then run from the pipeline 'ingest' on"
        )
    unknown = samples[~samples["task"].isin(list(METRICS))]
    if len(unknown):
        first = unknown.iloc[0]
        raise UserError(
            f"sample '{first['sample_id']}' has the task '{first['task']}', for which there is no metric "
            f"({len(unknown)} such samples): change it in the source to one of {', '.join(sorted(METRICS))}"
        )
    if OVERALL in set(samples["kind"]):
        raise UserError(f"the sample kind '{OVERALL}' is the name of the mean over all kinds: rename it in the source")


def average_scores(kinds: pd.Series, tasks: pd.Series, correct: pd.Series) -> dict[str, dict[str, Any]]:
    """Average the scores of one model.

    Args:
        kinds: Sample kind of each answer.
        tasks: Task name of each answer.
        correct: Whether each answer is right.

    Returns:
        `{kind: {task: share of right answers, "n": answers}}`, kinds in alphabetical order and `overall` last.
    """
    table = pd.DataFrame({"kind": kinds, "task": tasks, "correct": correct.astype(float)})
    by_kind = {str(kind): _mean_by_task(rows) for kind, rows in table.groupby("kind", sort=True)}
    return {**by_kind, OVERALL: _mean_by_task(table)}


def _mean_by_task(rows: pd.DataFrame) -> dict[str, Any]:
    means = rows.groupby("task", sort=True)["correct"].mean()
    return {**{str(task): float(mean) for task, mean in means.items()}, "n": len(rows)}

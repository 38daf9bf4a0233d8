"""The table of predictions: what was asked, expected and answered, and which answers are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from qvl_pipeline.evaluation.metrics import METRICS
from qvl_pipeline.media.arrow_rows import TokenizedSamples

MODELS = ("base", "trained")


def eval_samples(samples: TokenizedSamples, max_samples: int | None) -> pd.DataFrame:
    """Choose the samples to evaluate.

    Args:
        samples: The tokenized samples of all splits.
        max_samples: Most samples taken, spread evenly over the eval split; `None` takes all of it.

    Returns:
        Columns `sample_id`, `source`, `kind`, `task` and `expected`; the index is the row in `samples`.
    """
    table = samples.columns(["sample_id", "source", "split", "kind", "task", "answer"]).to_pandas()
    chosen = table[table["split"] == "eval"].drop(columns="split").rename(columns={"answer": "expected"})
    if max_samples is None or max_samples >= len(chosen):
        return chosen
    return chosen.iloc[np.linspace(0, len(chosen) - 1, max_samples).round().astype(int)]


def prediction_table(
    samples: pd.DataFrame, questions: Sequence[str], answers: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Put answers beside what was expected, and score each with the metric of its task.

    Args:
        samples: Rows of `eval_samples`.
        questions: Question of each.
        answers: Answers of each evaluated model, by its name in `MODELS`.

    Returns:
        The columns of `samples` with `question`, and `<model>_answer` (string) and `<model>_correct` (boolean) for both
        models: null for one that was not evaluated.
    """
    table = samples.reset_index(drop=True)
    table.insert(table.columns.get_loc("expected"), "question", list(questions))
    for model in MODELS:
        table[f"{model}_answer"] = pd.Series(answers.get(model), index=table.index, dtype="string")
    for model in MODELS:
        correct = _score(answers[model], table) if model in answers else None
        table[f"{model}_correct"] = pd.Series(correct, index=table.index, dtype="boolean")
    return table


def _score(answers: Sequence[str], table: pd.DataFrame) -> list[bool]:
    return [
        METRICS[task](answer, expected)
        for answer, expected, task in zip(answers, table["expected"], table["task"], strict=True)
    ]

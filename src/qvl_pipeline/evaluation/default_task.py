"""The task of samples whose rows name none: by how long the answers of their source are."""

from __future__ import annotations

import pandas as pd

from qvl_pipeline.data.tables import AUTO
from qvl_pipeline.evaluation.metrics import references
from qvl_pipeline.evaluation.tasks import words_of

# A text of more words is said in another way by a model that is right: none would match it.
LONG_WORDS = 10


def resolve_tasks(samples: pd.DataFrame) -> pd.DataFrame:
    """Replace the task `auto`: `rouge_l` where half of a source's answers are long, else `exact_match`.

    One task for all such samples of a source, so that its score is one figure.

    Args:
        samples: Columns `source`, `task` and `expected`.

    Returns:
        The samples with the column `task_from`: `answers of <median> words` where the task was replaced, else null.
    """
    resolved = samples.assign(task_from=pd.Series(None, index=samples.index, dtype="string"))
    unnamed = samples[samples["task"] == AUTO]
    for _, rows in unnamed.groupby("source", sort=True):
        words = rows["expected"].map(_shortest)
        long = (words > LONG_WORDS).mean() >= 0.5
        resolved.loc[rows.index, "task"] = "rouge_l" if long else "exact_match"
        length = words.median()
        resolved.loc[rows.index, "task_from"] = f"answers of {length:g} word{'' if length == 1 else 's'}"
    return resolved


def _shortest(expected: str) -> int:
    return min(len(words_of(text)) for text in references(expected))

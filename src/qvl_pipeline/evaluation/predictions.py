"""The table of predictions: what was asked, expected and answered, and what each answer is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.metrics import score_answers
from qvl_pipeline.media.arrow_rows import TokenizedSamples

MODELS = ("base", "trained")


def eval_samples(
    samples: TokenizedSamples, max_samples: int | None, task_by_source: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Choose the samples to evaluate: the eval split but for plain texts, which ask nothing, and benchmarks.

    Args:
        samples: The tokenized samples of all splits.
        max_samples: Most samples taken, spread evenly over the eval split; `None` takes all of it. Benchmarks are
            whole: a part of one is no figure to quote.
        task_by_source: Task of all samples of a source, instead of what its rows say.

    Returns:
        Columns `sample_id`, `source`, `kind`, `task`, `expected` and `prompt_length` (tokens before the last answer);
        the index is the row in `samples`.

    Raises:
        UserError: A source in `task_by_source` has no samples.
    """
    table = samples.columns(["sample_id", "source", "split", "kind", "task", "answer", "prompt_length"]).to_pandas()
    tasks = dict(task_by_source or {})
    if unknown := sorted(set(tasks) - set(table["source"])):
        known = ", ".join(sorted(set(table["source"])))
        raise UserError(f"evaluate.task_by_source names the source '{unknown[0]}', but the samples are of {known}")
    table["task"] = [tasks.get(source, task) for source, task in zip(table["source"], table["task"], strict=True)]
    asking = table[table["prompt_length"] > 0].rename(columns={"answer": "expected"})
    chosen, benchmarks = (asking[asking["split"] == split].drop(columns="split") for split in ("eval", "benchmark"))
    if max_samples is not None and max_samples < len(chosen):
        chosen = chosen.iloc[np.linspace(0, len(chosen) - 1, max_samples).round().astype(int)]
    return pd.concat([chosen, benchmarks]).sort_index()


def prediction_table(
    samples: pd.DataFrame,
    questions: Sequence[str],
    answers: Mapping[str, Sequence[str | None]],
    losses: Mapping[str, Sequence[float]],
    supervised_tokens: Sequence[int],
) -> pd.DataFrame:
    """Put answers beside what was expected, and score each with the metric of its task.

    Args:
        samples: Rows of `eval_samples`.
        questions: Question of each.
        answers: Answers of each evaluated model, by its name: in `MODELS`, or that of a server; `None` where it gave
            none.
        losses: Teacher-forced loss of each sample, in nats a supervised token, of the models that have them.
        supervised_tokens: Tokens that each loss is the mean of.

    Returns:
        The columns of `samples` with `question` and `supervised_tokens`, and `<model>_answer` (string),
        `<model>_score` and `<model>_loss` (numbers) for both `MODELS` and those of servers: null where there is none.
    """
    table = samples.reset_index(drop=True)
    table.insert(table.columns.get_loc("expected"), "question", list(questions))
    models = [*MODELS, *(name for name in answers if name not in MODELS)]
    for model in models:
        table[f"{model}_answer"] = pd.Series(answers.get(model), index=table.index, dtype="string")
    for model in models:
        given = table[table[f"{model}_answer"].notna()]
        scores = score_answers(given[f"{model}_answer"].tolist(), given["expected"], given["task"])
        table[f"{model}_score"] = pd.Series(scores, index=given.index, dtype="Float64").reindex(table.index)
    table["supervised_tokens"] = list(supervised_tokens)
    for model in models:
        table[f"{model}_loss"] = pd.Series(losses.get(model), index=table.index, dtype="Float64")
    return table

"""Scores of generated answers, averaged by sample kind, by source and by length."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.tasks import (
    BENCHMARK_TASKS,
    BY_ANSWER,
    FORMAL,
    MEAN_OF_KINDS,
    NOT_A_MEAN,
    TASKS,
    TOGETHER,
    best_reference,
    import_cider,
)
from qvl_pipeline.kinds import OVERALL, kinds_in, rows_of
from qvl_pipeline.tokens.thoughts import without_thoughts

# Of the teacher-forced answer: lower is better, and no score.
LOSSES = ("loss", "perplexity")


def check_scorable(samples: pd.DataFrame) -> None:
    """Refuse samples that could not be scored, before anything is generated.

    Args:
        samples: Columns `sample_id`, `kind`, `task` and `expected`.

    Raises:
        UserError: There is no sample, a task has no metric, not the form of answer or not the package that its metric
            needs, or a sample kind is called `overall`.
    """
    if samples.empty:
        raise UserError(
            "the eval split is empty, so there is nothing to evaluate: give a source 'split: eval' or its rows a "
            "column 'split', or raise 'eval_fraction' of 'ingest'; then run from the pipeline 'ingest' on"
        )
    unknown = samples[~samples["task"].isin(TASKS)]
    if len(unknown):
        first = unknown.iloc[0]
        raise UserError(
            f"sample '{first['sample_id']}' has the task '{first['task']}', for which there is no metric "
            f"({len(unknown)} such samples): change it in the source, or by evaluate.task_by_source, to one of "
            f"{', '.join(sorted(TASKS))}"
        )
    if "cider" in set(samples["task"]):
        import_cider()
    if OVERALL in set(samples["kind"]):
        raise UserError(f"the sample kind '{OVERALL}' is the name of the mean over all kinds: rename it in the source")
    for row in samples[samples["task"].isin(FORMAL)].itertuples():
        try:
            for text in references(row.expected):
                BY_ANSWER[row.task](text, text)
        except UserError as error:
            raise UserError(f"sample '{row.sample_id}': {error}") from error


def references(expected: str) -> list[str]:
    """Read the acceptable answers: a JSON list of texts (`["7", "seven"]`), or one text as it is."""
    if expected.lstrip().startswith('["'):
        try:
            texts = json.loads(expected)
        except json.JSONDecodeError:
            return [expected]
        if texts and all(isinstance(text, str) for text in texts):
            return texts
    return [expected]


def right_answers(expected: str, task: str) -> list[str]:
    """Return the acceptable answers for people to read: of a benchmark without what else its score goes by."""
    if task in BENCHMARK_TASKS and expected.startswith("{"):
        answer = json.loads(expected)["answer"]
        return answer if isinstance(answer, list) else [answer]
    return references(expected)


def score_answers(answers: Sequence[str], expected: Sequence[str], tasks: Sequence[str]) -> list[float]:
    """Score each answer by the metric of its task.

    Args:
        answers: Generated texts `[N]`; a thought before the answer, and blanks around it, are not scored.
        expected: The dataset's answers `[N]`; see `references`.
        tasks: Task names `[N]`, all in `TASKS`.

    Returns:
        Scores `[N]`.
    """
    said = [without_thoughts(answer).strip() for answer in answers]
    table = pd.DataFrame({"answer": said, "expected": expected})
    scores = pd.Series(0.0, index=table.index)
    for task, rows in table.groupby(pd.Series(list(tasks), index=table.index)):
        given, wanted = rows["answer"].tolist(), rows["expected"].tolist()
        if score := BENCHMARK_TASKS.get(str(task)):
            scores[rows.index] = [score(*pair) for pair in zip(given, wanted, strict=True)]
            continue
        wanted = [references(text) for text in wanted]
        together = TOGETHER.get(str(task))
        if together is None:
            score = partial(best_reference, BY_ANSWER[str(task)])
            scores[rows.index] = [score(*pair) for pair in zip(given, wanted, strict=True)]
        else:
            scores[rows.index] = together(given, wanted)
    return scores.tolist()


def check_answered(predictions: pd.DataFrame, models: Sequence[str]) -> None:
    """Refuse to average nothing: a kind and metric of which a model has answered no sample has no score.

    Raises:
        UserError: There is one.
    """
    for model in models:
        answered = predictions[f"{model}_answer"].notna()
        for (kind, task), some in answered.groupby([predictions["kind"], predictions["task"]]).any().items():
            if not some:
                raise UserError(
                    f"'{model}' has answered none of the samples of kind '{kind}' and task '{task}': see why in the log"
                )


def average_scores(predictions: pd.DataFrame, model: str) -> dict[str, dict[str, Any]]:
    """Average the scores of one model by sample kind.

    Args:
        predictions: Table `predictions`.
        model: `base` or `trained`.

    Returns:
        `{kind: {task: score, "loss": nats a token, "perplexity": its exponential, "n": answers}}`, of `kinds_in`.
        Samples without an answer are in no score, and a model without losses has neither of these.
    """
    return {kind: _by_task(rows_of(predictions, kind), model) for kind in kinds_in(predictions)}


def slices(predictions: pd.DataFrame, model: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Average the scores of one model by source, and, but for benchmarks, by the length of the prompt in tokens.

    Lengths are cut in quarters of the samples; those of one length are together, so that there may be fewer.

    Args:
        predictions: Table `predictions`, with the column `prompt_length`.
        model: `base` or `trained`.

    Returns:
        `{"source": {name: {task: score, "n": answers}}, "prompt_length": {"12-40": …}}`.
    """
    own = rows_of(predictions, OVERALL)
    length = own["prompt_length"]
    quarters = ((length.rank(method="min") - 1) * 4) // len(own)
    by_length = {
        f"{rows['prompt_length'].min()}-{rows['prompt_length'].max()}": _by_task(rows, model)
        for _, rows in own.groupby(quarters, sort=True)
    }
    by_source = {str(name): _by_task(rows, model) for name, rows in predictions.groupby("source", sort=True)}
    return {"source": by_source, "prompt_length": by_length}


def _by_task(rows: pd.DataFrame, model: str) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    answered = rows[rows[f"{model}_answer"].notna()]
    for task, group in answered.groupby("task", sort=True):
        together = NOT_A_MEAN.get(str(task))
        if task in MEAN_OF_KINDS:
            scores[str(task)] = float(group.groupby("kind")[f"{model}_score"].mean().mean())
        elif together is None:
            scores[str(task)] = float(group[f"{model}_score"].mean())
        else:
            wanted = [references(text) for text in group["expected"]]
            scores[str(task)] = together(group[f"{model}_answer"].tolist(), wanted)
    if rows[f"{model}_loss"].isna().all():
        return {**scores, "n": len(answered)}
    tokens = rows["supervised_tokens"].astype(float)
    loss = float((rows[f"{model}_loss"].astype(float) * tokens).sum() / tokens.sum())
    # Above about e^700 it is infinite, which JSON does not have.
    return {**scores, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "n": len(answered)}

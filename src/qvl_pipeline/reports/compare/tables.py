"""What changed between trainings, and did it help? The comparison as tables; `page` draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qvl_pipeline.errors import UserError
from qvl_pipeline.intervals import bootstrap_interval, score
from qvl_pipeline.kinds import OVERALL, kinds_in, rows_of
from qvl_pipeline.tracking.mlflow.recorded import RecordedRun, find_runs, read_run

MOST_RUNS = 8
EXAMPLES = 10
NOT_SET = "not set"
# Samples are the same when they ask the same and expect the same, not only when they have the same number.
SAME_SAMPLE = ["sample_id", "kind", "task", "question", "expected"]


@dataclass(frozen=True)
class Comparison:
    """Trainings side by side. Where runs are columns or levels, they have the names in the index of `runs`.

    Attributes:
        runs: One row a run: `run_id`, `profile`, `started` (milliseconds since 1970).
        parameters: Parameters whose values differ, one column a run; values are text.
        curves: Long table of `run`, `metric`, `step`, `value`.
        scores: `run`, `kind`, `metric`, `rate`, `n`, `low`, `high`: mean score and 95 % interval (Wilson where answers
            are right or wrong, else bootstrap); without predictions in MLflow the bounds are NaN.
        differences: Second and later runs against the first on the samples that both answered: `run`, `kind`, `metric`,
            `n`, `difference`, and `low`, `high`, the 95 % interval of the paired bootstrap.
        figures: Speed, memory and results, one column a run; NaN where a run has none.
        versions: Code and data, one column a run; `""` where a run has none.
        disagreements: Up to ten samples that runs answered differently, indexed by `SAME_SAMPLE`, with the columns
            `(run, "answer")` and `(run, "score")` for every run.
        disagreeing: How many such samples there are.
        common: How many samples all runs answered.
    """

    runs: pd.DataFrame
    parameters: pd.DataFrame
    curves: pd.DataFrame
    scores: pd.DataFrame
    differences: pd.DataFrame
    figures: pd.DataFrame
    versions: pd.DataFrame
    disagreements: pd.DataFrame
    disagreeing: int
    common: int


def compare_runs(names: list[str] | None = None) -> Comparison:
    """Compare trainings that the current MLflow tracking server or database has.

    Args:
        names: Profiles or DVC experiments (their newest finished training), or MLflow run ids; by default, all
            profiles. The first is what the others are compared with.

    Raises:
        UserError: A name means no training, or these are not two to eight trainings.
    """
    found = find_runs(names or [])
    if not 2 <= len(found) <= MOST_RUNS:
        raise UserError(
            f"compare.runs: {len(found)} trainings were found, and 2 to {MOST_RUNS} can be compared: name profiles, "
            "DVC experiments or MLflow run ids, for example compare.runs=tiny_qwen3_vl+tiny_qwen2_5_vl"
        )
    return compare([read_run(training, evaluation) for training, evaluation in found])


def compare(recorded: list[RecordedRun]) -> Comparison:
    """Compare trainings that were read from MLflow."""
    runs = dict(zip(_labels(recorded), recorded, strict=True))
    answers = _common_answers(runs)
    differing = answers[answers.xs("answer", axis=1, level=1).nunique(axis=1) > 1]
    return Comparison(
        runs=pd.DataFrame(
            [(run.run_id, run.name, run.started) for run in recorded],
            index=pd.Index(runs, name="run"),
            columns=["run_id", "profile", "started"],
        ),
        parameters=_parameters(runs),
        curves=_curves(runs),
        scores=pd.DataFrame(
            [row for name, run in runs.items() for row in _scores(name, run)],
            columns=["run", "kind", "metric", "rate", "n", "low", "high"],
        ),
        differences=pd.DataFrame(
            [row for pair in list(runs)[1:] for row in _differences(runs, next(iter(runs)), pair)],
            columns=["run", "kind", "metric", "n", "difference", "low", "high"],
        ),
        figures=pd.DataFrame(
            {name: {key: of(run) for key, of in FIGURES.items()} for name, run in runs.items()}, dtype=object
        ).dropna(how="all"),
        versions=_versions(runs),
        disagreements=_examples(differing),
        disagreeing=len(differing),
        common=len(answers),
    )


def _labels(recorded: list[RecordedRun]) -> list[str]:
    """Return the DVC experiment or the profile of each run, with the start of its id where that is not enough."""
    names = [run.tags.get("dvc_experiment", run.name) for run in recorded]
    return [
        name if names.count(name) == 1 else f"{name} {run.run_id[:8]}"
        for name, run in zip(names, recorded, strict=True)
    ]


def _parameters(runs: dict[str, RecordedRun]) -> pd.DataFrame:
    table = pd.DataFrame({name: pd.Series(run.parameters, dtype=object) for name, run in runs.items()})
    table = table.fillna(NOT_SET).sort_index().rename_axis("parameter")
    return table[table.nunique(axis=1) > 1]


def _curves(runs: dict[str, RecordedRun]) -> pd.DataFrame:
    parts = [
        values.rename("value").reset_index().assign(run=name, metric=metric)
        for name, run in runs.items()
        for metric, values in run.curves.items()
    ]
    columns = ["run", "metric", "step", "value"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _by_kind(answers: Any) -> list[tuple[str, str, Any]]:
    """Return kind, task and rows of every kind of sample, and of all of them last."""
    groups = ((kind, rows_of(answers, kind)) for kind in kinds_in(answers))
    return [(kind, task, found) for kind, rows in groups for task, found in rows.groupby("task", sort=True)]


def _scores(name: str, run: RecordedRun) -> list[tuple]:
    if run.predictions is None:
        return _scores_without_answers(name, run.metrics)
    groups = _by_kind(run.predictions)
    scores = ((kind, task, rows["trained_score"].astype(float).to_numpy()) for kind, task, rows in groups)
    return [(name, kind, task, *score(values.mean(), values)) for kind, task, values in scores]


def _scores_without_answers(name: str, metrics: dict[str, float]) -> list[tuple]:
    """Scores from the metrics of the run: a large table of predictions is not copied into MLflow."""
    rows = []
    for key, value in metrics.items():
        model, _, rest = key.partition("/")
        kind, _, metric = rest.rpartition("/")
        if model == "trained" and kind and metric not in ("loss", "perplexity", "n"):
            n = metrics.get(f"trained/{kind}/n", np.nan)
            rows.append((name, kind, metric, value, n, np.nan, np.nan))
    return sorted(rows, key=lambda row: (row[1] == OVERALL, row[1]))


def _differences(runs: dict[str, RecordedRun], first: str, other: str) -> list[tuple]:
    both = _common_answers({name: runs[name] for name in (first, other)})
    # Samples are drawn in pairs, so that what makes a sample hard for both models does not widen the interval.
    gains = (both[other, "score"] - both[first, "score"]).astype(float).rename("gain").reset_index()
    groups = ((kind, task, rows["gain"].to_numpy()) for kind, task, rows in _by_kind(gains))
    return [(other, kind, task, len(rows), rows.mean(), *bootstrap_interval(rows)) for kind, task, rows in groups]


def _common_answers(runs: dict[str, RecordedRun]) -> pd.DataFrame:
    """Return `(run, "answer")` and `(run, "score")` of the samples that all runs answered, by `SAME_SAMPLE`."""
    tables = [_answers(run) for run in runs.values()]
    return pd.concat(tables, axis=1, join="inner", keys=list(runs)).sort_index()


def _answers(run: RecordedRun) -> pd.DataFrame:
    columns = {"trained_answer": "answer", "trained_score": "score"}
    predictions = pd.DataFrame(columns=[*SAME_SAMPLE, *columns]) if run.predictions is None else run.predictions
    return predictions.set_index(SAME_SAMPLE)[list(columns)].rename(columns=columns)


def _examples(differing: pd.DataFrame) -> pd.DataFrame:
    """Return up to `EXAMPLES` rows, of all kinds in turn, those with the largest difference in score first."""
    scores = differing.xs("score", axis=1, level=1).astype(float)
    order = (scores.max(axis=1) - scores.min(axis=1)).rename("spread").reset_index()
    order = order.sort_values("spread", ascending=False, kind="stable")
    order["turn"] = order.groupby("kind").cumcount()
    return differing.iloc[order.sort_values(["turn", "kind"], kind="stable").index[:EXAMPLES]]


def _versions(runs: dict[str, RecordedRun]) -> pd.DataFrame:
    tags = {
        "code: git commit": "mlflow.source.git.commit",
        "code: uncommitted changes": "git_dirty",
        "DVC experiment": "dvc_experiment",
        "data: fingerprint of the sources": "data_fingerprint",
        "data: fingerprint of the plan": "plan_fingerprint",
    }
    columns = {
        name: {title: run.tags.get(tag, "") for title, tag in tags.items()}
        | {f"data: {dataset}": digest for dataset, digest in sorted(run.data.items())}
        for name, run in runs.items()
    }
    table = pd.DataFrame(columns).fillna("").rename_axis("version")
    return table[(table != "").any(axis=1)]


def _of_result(key: str) -> Callable[[RecordedRun], float | str]:
    return lambda run: run.result.get(key, np.nan)


def _of_curve(metric: str, reduce: Callable[[pd.Series], float]) -> Callable[[RecordedRun], float]:
    return lambda run: float(reduce(run.curves[metric])) if metric in run.curves else np.nan


def _steady(speeds: pd.Series) -> float:
    """Return the mean over the logged steps after the first, in which kernels are chosen and caches are cold."""
    return speeds.iloc[min(1, len(speeds) - 1) :].mean()


FIGURES: dict[str, Callable[[RecordedRun], float | str]] = {
    "device": _of_result("device"),
    "ranks": _of_result("world_size"),
    "optimizer steps": _of_result("steps"),
    "tokens": _of_result("tokens"),
    "parameters": _of_result("parameters"),
    "trained parameters": _of_result("trained_parameters"),
    "training time, s": _of_result("train_time_s"),
    "tokens per second": _of_curve("train/tokens_per_second", _steady),
    "step time, s": _of_curve("train/step_time_s", _steady),
    "MFU": _of_curve("train/mfu", _steady),
    "waiting for data, share": _of_curve("train/data_wait_share", pd.Series.mean),
    "peak memory, GiB": _of_curve("train/peak_memory_gib", pd.Series.max),
    "last training loss": _of_curve("train/loss", lambda values: values.iloc[-1]),
    "lowest eval loss": _of_curve("train/eval_loss", pd.Series.min),
}

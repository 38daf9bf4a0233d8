"""What MLflow has of a run that is needed to repeat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlflow
import yaml
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.lineage.uncommitted import MASKED, PATCH
from qvl_pipeline.tracking.mlflow.chain import EVALUATES
from qvl_pipeline.tracking.mlflow.server import answering

GIVEN = "given_parameters.yml"


@dataclass(frozen=True)
class RecordedRun:
    """A finished run.

    Attributes:
        id: Its id in MLflow.
        experiment_id: Its experiment.
        pipelines: Names as given to `kedro run`; empty for all stages.
        commit: Commit of the code.
        patch: What differed from that commit; empty when nothing did.
        profile: The profile.
        dataset: The dataset of the profile.
        data_fingerprint: Fingerprint of the raw data; empty when it was not known.
        parameters: All parameters blocks as they were given, without defaults.
        inputs: Digest of every catalog entry that the run read from disk.
    """

    id: str
    experiment_id: str
    pipelines: tuple[str, ...]
    commit: str
    patch: str
    profile: str
    dataset: str
    data_fingerprint: str
    parameters: dict[str, Any]
    inputs: dict[str, str]


def read_run(run_id: str) -> RecordedRun:
    """Return what MLflow has of a run.

    Raises:
        UserError: There is no such run, or it cannot be repeated; or MLflow's server is down.
    """
    try:
        with answering():
            run = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise UserError(f"run_id: MLflow at {mlflow.get_tracking_uri()} has no run '{run_id}'") from error
    if parent := run.data.tags.get(EVALUATES):
        raise UserError(f"run_id: {run_id} evaluates the training {parent}: replay that, its evaluation follows")
    return _recorded(run)


def evaluations(training: RecordedRun) -> list[RecordedRun]:
    """Return the newest finished evaluation of a training, if it has one and was made by the same commit."""
    found = mlflow.MlflowClient().search_runs(
        [training.experiment_id],
        f"tags.{EVALUATES} = '{training.id}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    runs = [_recorded(run) for run in found]
    return [run for run in runs if (run.commit, run.patch) == (training.commit, training.patch)]


def _recorded(run: Run) -> RecordedRun:
    tags, run_id = run.data.tags, run.info.run_id
    if run.info.status != "FINISHED":
        raise UserError(f"run_id: {run_id} is {run.info.status.lower()}, only a finished run can be replayed")
    if missing := [name for name in ("mlflow.source.git.commit", "pipelines", "profile") if name not in tags]:
        raise UserError(f"run_id: {run_id} cannot be replayed, it was recorded without {', '.join(missing)}")
    if MASKED in tags:
        raise UserError(
            f"run_id: {run_id} cannot be replayed, its code held a secret that is masked in {PATCH}: take it out of "
            "the code, and train again"
        )
    dirty = tags.get("git_dirty") == "true"
    names = tags["pipelines"].split("+")
    return RecordedRun(
        id=run_id,
        experiment_id=run.info.experiment_id,
        pipelines=() if names == ["__default__"] else tuple(names),
        commit=tags["mlflow.source.git.commit"],
        patch=_artifact(run, PATCH) if dirty else "",
        profile=tags["profile"],
        dataset=tags["dataset"],
        data_fingerprint=tags.get("data_fingerprint", ""),
        parameters=yaml.safe_load(_artifact(run, GIVEN)),
        inputs={entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs},
    )


def _artifact(run: Run, name: str) -> str:
    try:
        return mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{name}")
    except (MlflowException, OSError) as error:
        raise UserError(f"run_id: {run.info.run_id} cannot be replayed, its artifact {name} is not there") from error


def numbers_of(run_id: str) -> dict[tuple[str, int], float]:
    """Return every metric of a run at every step; of one recorded several times, the newest."""
    client = mlflow.MlflowClient()
    histories = {name: client.get_metric_history(run_id, name) for name in client.get_run(run_id).data.metrics}
    return {
        (name, metric.step): metric.value
        for name, history in histories.items()
        for metric in sorted(history, key=lambda metric: metric.timestamp)
    }

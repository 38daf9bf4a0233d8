"""What MLflow has of a training: found by profile, DVC experiment or run id, and read into plain tables."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.flattening import parameter_leaves
from qvl_pipeline.tracking.mlflow.chain import EVALUATES

# Names that a training is looked up by, next to the id of its run.
NAME_TAGS = ("profile", "dvc_experiment")
CURVES = (
    "train/loss",
    "train/eval_loss",
    "train/learning_rate",
    "train/tokens_per_second",
    "train/step_time_s",
    "train/mfu",
    "train/data_wait_share",
    "train/peak_memory_gib",
)


@dataclass(frozen=True)
class RecordedRun:
    """One training with its newest evaluation.

    Attributes:
        run_id: MLflow run of the training.
        name: Profile.
        started: When it started, in milliseconds since 1970.
        parameters: All parameters by their flat names (`train.learning_rate`, `ingest.datasets.digits.weight`), as
            text; those of block `evaluate` are from the evaluation.
        metrics: Last value of every metric.
        curves: Value by step of every metric in `CURVES` that was recorded.
        tags: Tags of the training.
        data: Digest of every dataset that the training or its evaluation read, by name.
        result: `train_result.json`; empty when the run has none.
        predictions: One row for every evaluated sample; None when the run has none.
    """

    run_id: str
    name: str
    started: int
    parameters: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, pd.Series]
    tags: dict[str, str]
    data: dict[str, str]
    result: dict[str, Any]
    predictions: pd.DataFrame | None


def find_runs(names: list[str]) -> list[tuple[Run, Run]]:
    """Find trainings in MLflow, each with the run that evaluated it last.

    Args:
        names: Profiles or DVC experiments, of which the newest finished training is meant, or run ids: of a training,
            or of an evaluation of it. None of them means the newest training of every profile.

    Raises:
        UserError: A name means no training, or two of them the same one.
    """
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = [_training(client, experiments, name) for name in names or _profiles(client, experiments)]
    ids = [training.info.run_id for training, _ in found]
    for index, run_id in enumerate(ids):
        if run_id in ids[:index]:
            first = names[ids.index(run_id)]
            raise UserError(f"compare.runs: '{first}' and '{names[index]}' are the same training, MLflow run {run_id}")
    return found


def read_run(training: Run, evaluation: Run) -> RecordedRun:
    """Read what is compared of a training and its evaluation."""
    client = MlflowClient()
    run_id = training.info.run_id
    parameters = _parameters(training)
    if evaluation is not training:
        parameters = {key: value for key, value in parameters.items() if not key.startswith("evaluate.")}
        parameters |= {key: value for key, value in _parameters(evaluation).items() if key.startswith("evaluate.")}
    inputs = [dataset.dataset for run in (evaluation, training) for dataset in run.inputs.dataset_inputs]
    result = _artifact(training, "train_result.json")
    predictions = _artifact(evaluation, "predictions.parquet")
    return RecordedRun(
        run_id=run_id,
        name=training.data.tags.get("profile", training.info.run_name),
        started=training.info.start_time,
        parameters=parameters,
        metrics=dict(training.data.metrics),
        curves={key: _curve(client, run_id, key) for key in CURVES if key in training.data.metrics},
        tags=dict(training.data.tags),
        data={dataset.name: dataset.digest for dataset in inputs},
        result=json.loads(result) if result else {},
        predictions=pd.read_parquet(BytesIO(predictions)) if predictions else None,
    )


def _profiles(client: MlflowClient, experiments: list[str]) -> list[str]:
    runs = _search(client, experiments, "attributes.status = 'FINISHED'")
    return sorted({run.data.tags["profile"] for run in runs if "profile" in run.data.tags and _trains(run)})


def _training(client: MlflowClient, experiments: list[str], name: str) -> tuple[Run, Run]:
    for tag in NAME_TAGS:
        quoted = name.replace("'", "\\'")
        runs = _search(client, experiments, f"tags.{tag} = '{quoted}' and attributes.status = 'FINISHED'")
        if training := next(filter(_trains, runs), None):
            return training, _newest_evaluation(client, training)
    try:
        run = client.get_run(name)
    except MlflowException as error:
        raise UserError(
            f"compare.runs: MLflow has no finished training of a profile or DVC experiment '{name}', and no run of "
            f"this id; there are trainings of {', '.join(_profiles(client, experiments)) or 'no profile'}"
        ) from error
    if parent := run.data.tags.get(EVALUATES):
        return client.get_run(parent), run
    if not _trains(run):
        raise UserError(f"compare.runs: MLflow run {name} is no training; it ran {run.data.tags.get('pipelines')}")
    return run, _newest_evaluation(client, run)


def _newest_evaluation(client: MlflowClient, training: Run) -> Run:
    """Return the newest run that evaluated `training` later, else `training`, which may have evaluated itself."""
    later = f"tags.{EVALUATES} = '{training.info.run_id}' and attributes.status = 'FINISHED'"
    return next(iter(_search(client, [training.info.experiment_id], later)), training)


def _search(client: MlflowClient, experiments: list[str], condition: str) -> list[Run]:
    return list(client.search_runs(experiments, condition, order_by=["attributes.start_time DESC"], max_results=1000))


def _trains(run: Run) -> bool:
    return bool({"train", "__default__"} & set(run.data.tags.get("pipelines", "").split("+")))


def _parameters(run: Run) -> dict[str, str]:
    """Return the merged parameters of all blocks; those MLflow lists are of the stages that ran only, and cut."""
    merged = _artifact(run, "parameters.yml")
    if merged is None:
        return dict(run.data.params)
    leaves = parameter_leaves(yaml.safe_load(merged))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves}


def _curve(client: MlflowClient, run_id: str, key: str) -> pd.Series:
    history = client.get_metric_history(run_id, key)
    values = pd.Series([point.value for point in history], [point.step for point in history], dtype=float, name=key)
    return values[~values.index.duplicated(keep="last")].sort_index().rename_axis("step")


def _artifact(run: Run, name: str) -> bytes | None:
    """Return the content of an artifact; None when the run has none of this name."""
    if name not in {artifact.path for artifact in MlflowClient().list_artifacts(run.info.run_id)}:
        return None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for a file or two, of a few MB
    with tempfile.TemporaryDirectory() as folder:
        return Path(download_artifacts(run_id=run.info.run_id, artifact_path=name, dst_path=folder)).read_bytes()

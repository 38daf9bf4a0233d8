"""One MLflow run: what is recorded, within MLflow's limits and without secrets."""

from __future__ import annotations

import getpass
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_SOURCE_NAME, MLFLOW_USER
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, MAX_PARAM_VAL_LENGTH

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.lineage import content_digest, flattened, numbers, without_secrets

logger = logging.getLogger(__name__)

# A prediction table of a large eval split belongs to DVC, not into an artifact store.
MAX_ARTIFACT_BYTES = 50 * 2**20


def start_run(tracking_uri: str, experiment: str, artifact_location: str, name: str) -> MlflowRun:
    """Create a new run and make it the active one.

    Args:
        tracking_uri: Database or server that records the run.
        experiment: Name of the experiment; created when it does not exist.
        artifact_location: Folder of the artifacts, for an experiment in a local database. A server has its own.
        name: Name of the run.

    Raises:
        UserError: The tracking server or database cannot be used.
    """
    mlflow.set_tracking_uri(tracking_uri)
    local = tracking_uri.startswith("sqlite:")
    try:
        experiment_id = _experiment_id(experiment, Path(artifact_location).as_uri() if local else None)
        mlflow.set_experiment(experiment_id=experiment_id)
        command = without_secrets(" ".join(["kedro", *sys.argv[1:]]))
        tags = {MLFLOW_USER: _user(), MLFLOW_SOURCE_NAME: command}
        run_id = mlflow.MlflowClient().create_run(experiment_id, tags=tags, run_name=name).info.run_id
        # Given a run, MLflow neither continues one it finds in MLFLOW_RUN_ID nor imports IPython to look for more.
        mlflow.start_run(run_id, nested=True)
    except MlflowException as error:
        raise UserError(without_secrets(f"MLflow at {tracking_uri} cannot record this run: {error}")) from error
    return MlflowRun(run_id)


def _experiment_id(name: str, artifact_location: str | None) -> str:
    client = mlflow.MlflowClient()
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location)
    except MlflowException:
        # Two first runs at once: the other process was faster.
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container whose user id has no name.
        return "unknown"


def metric_entries(values: dict[str, Any], step: int = 0) -> list[Metric]:
    """Return the numbers in nested `values` as metrics, their keys joined by `/`."""
    now_ms = int(time.time() * 1000)
    return [Metric(valid_name(key), float(value), now_ms, step) for key, value in numbers(values, "/").items()]


def valid_name(name: str) -> str:
    """Return `name` with every character MLflow does not take replaced by `_`, and not longer than it takes."""
    return re.sub(r"[^\w./ -]|(?<=/)/", "_", name)[:MAX_ENTITY_KEY_LENGTH]


class MlflowRun:
    """A run of this process. Written through a client, so that it does not matter in which thread."""

    def __init__(self, run_id: str) -> None:
        """Take over the run `run_id`."""
        self.id = run_id
        self._client = mlflow.MlflowClient()

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Set tags."""
        self._client.log_batch(self.id, tags=[RunTag(valid_name(key), str(value)) for key, value in tags.items()])

    def log_parameters(self, blocks: dict[str, Any]) -> None:
        """Log nested parameters under flat names (`train.learning_rate`); lists are JSON.

        A value that is too long for MLflow is cut; its name is then in the tag `parameters_cut` and in the log.
        """
        leaves = flattened(without_secrets(blocks), ".")
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves}
        self._client.log_batch(
            self.id, params=[Param(valid_name(key), text[:MAX_PARAM_VAL_LENGTH]) for key, text in texts.items()]
        )
        if cut := [key for key, text in texts.items() if len(text) > MAX_PARAM_VAL_LENGTH]:
            self.set_tags({"parameters_cut": ", ".join(cut)})
            logger.warning("MLflow shows only the start of %s; parameters.yml of the run has all of it", ", ".join(cut))

    def log_yaml(self, values: dict[str, Any], name: str) -> None:
        """Log `values` as an artifact in YAML."""
        mlflow.log_dict(without_secrets(values), name, run_id=self.id)

    def log_metrics(self, values: dict[str, Any], run_id: str | None = None) -> None:
        """Log the numbers in nested `values` (`trained/video/exact_match`), to this or to another run."""
        self._client.log_batch(run_id or self.id, metrics=metric_entries(values))

    def log_artifact(self, path: Path) -> None:
        """Log a file, unless it is larger than `MAX_ARTIFACT_BYTES`."""
        if (size := path.stat().st_size) > MAX_ARTIFACT_BYTES:
            logger.info("%s (%d MiB) is not copied into MLflow", path.name, size // 2**20)
        else:
            self._client.log_artifact(self.id, str(path))

    def log_input(self, name: str, path: Path, context: str) -> None:
        """Log a file or folder that the run reads, with a digest of its content."""
        dataset = Dataset(name, content_digest(path), source_type="local", source=json.dumps({"uri": str(path)}))
        self._client.log_inputs(self.id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])])

    def finish(self, status: str) -> None:
        """End the run as `FINISHED`, `FAILED` or `KILLED`."""
        active = mlflow.active_run()
        if active is not None and active.info.run_id == self.id:
            mlflow.end_run(status)
        else:
            self._client.set_terminated(self.id, status)

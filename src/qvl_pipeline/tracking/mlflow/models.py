"""Models in MLflow: one LoggedModel each, with its scores; versions in the registry, and the alias of the best.

The weights stay where they are. What MLflow has of a model is a pointer, and how to load by it (`loading.py`). All of
this may be done twice without doing anything more, since what a server did not take is sent again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from qvl_pipeline.data.base_model import read_base_model
from qvl_pipeline.intervals import bootstrap_interval
from qvl_pipeline.kinds import rows_of
from qvl_pipeline.tracking.lineage.base_model import base_model_digest
from qvl_pipeline.tracking.lineage.data_version import data_version
from qvl_pipeline.tracking.lineage.digests import weights_digest

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

logger = logging.getLogger(__name__)

POINTER = "pointer.json"
PREDICTIONS = "predictions.parquet"
# Of a version: the run that has the answers of its model.
EVALUATION = "evaluation_run"
_NOT_IN_NAMES = re.compile(r"[/:.%\"']")
_LOADER = "qvl_pipeline.tracking.mlflow.loading"
_MODEL_TYPE = "vision-language"
# Samples are the same when they ask the same and expect the same.
_SAMPLE = ["sample_id", "kind", "task", "question", "expected"]


def pointer_to(folder: Path) -> dict[str, str]:
    """Return where a model is and which it is: `path`, `digest` and `version` as DVC has it, `weights`.

    Args:
        folder: Folder of the model, in the project or elsewhere.
    """
    # Read whatever its size: DVC's record would be believed if its size is right, and so is that of any training.
    read = data_version(folder, read_all=True)
    pointer = {"path": _in_project(folder), "digest": read.digest, "version": read.origin}
    return pointer | {"weights": weights_digest(folder)}


def pointer_to_base(base_model: Path) -> dict[str, str]:
    """Return where the untrained model is and which it is, as `pointer_to` does.

    By the digest that trainings know it by: it may be on the hub, and is of no stage's making.

    Args:
        base_model: The catalog entry: a folder with `manifest.json`.
    """
    model, digest = read_base_model(base_model), base_model_digest(base_model)
    path = _in_project(base_model) if model.is_own else model.path
    return {"path": path, "digest": digest, "version": "the model that was trained", "weights": digest}


def _in_project(folder: Path) -> str:
    path = folder.absolute()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def log_model(
    client: MlflowClient,
    run_id: str,
    name: str,
    pointer: dict[str, str],
    parameters: dict[str, str],
    source_run: str,
    points: list[tuple[str, float, int, int]],
    dataset: tuple[str, str] | None,
) -> None:
    """Let MLflow have a model, and scores of it.

    Args:
        client: Of the server.
        run_id: The run that scored it; without scores, the one that made it.
        name: Name of the model, such as `qwen3_vl_8b-step-300`.
        pointer: What `pointer_to` returns.
        parameters: What made it, by flat names.
        source_run: The run that made it.
        points: Scores: name, value, time in milliseconds, and step.
        dataset: Name and digest of the data that they are on.
    """
    model = _find(client, source_run, pointer["weights"]) or _create(client, name, pointer, parameters, source_run)
    # Databases take the same score of a model once only, and refuse it with all others the second time.
    there = {(metric.key, metric.timestamp, metric.step) for metric in model.metrics or []}
    data_name, digest = dataset or (None, None)
    metrics = [Metric(*point, model.model_id, data_name, digest, run_id) for point in points]
    if new := [each for each in metrics if (each.key, each.timestamp, each.step) not in there]:
        client.log_batch(run_id, metrics=new)


def register(
    client: MlflowClient,
    run_id: str,
    registered_name: str,
    pointer: dict[str, str],
    source_run: str,
    alias: str | None,
    promote: dict[str, str] | None,
) -> None:
    """Make a model that was evaluated a version in the registry, and give out aliases.

    Args:
        client: Of the server.
        run_id: The run that evaluated it, with its answers.
        registered_name: Name in the registry.
        pointer: What `pointer_to` returns.
        source_run: The run that made the model.
        alias: What the newest version is called.
        promote: `alias` and `on`: who gets this alias, by its scores on which kind of samples.
    """
    model = _find(client, source_run, pointer["weights"])
    if model is None:
        raise MlflowException(f"run {source_run} has no model {pointer['path']}", RESOURCE_DOES_NOT_EXIST)
    with contextlib.suppress(MlflowException):  # it exists, or the next request says what is wrong
        client.create_registered_model(registered_name)
    versions = client.search_model_versions(f"name = '{registered_name}'")
    registered = next((each for each in versions if each.tags.get(EVALUATION) == run_id), None)
    if registered is None:
        source = f"models:/{model.model_id}"
        tags = pointer | {EVALUATION: run_id}
        registered = client.create_model_version(registered_name, source, source_run, tags, model_id=model.model_id)
    if alias:
        client.set_registered_model_alias(registered_name, alias, registered.version)
    logger.info("model registry: %s version %s%s", registered_name, registered.version, f" ({alias})" * bool(alias))
    if promote:
        _promote(client, registered, run_id, promote["alias"], promote["on"])


def _promote(client: MlflowClient, version: ModelVersion, run_id: str, alias: str, kind: str) -> None:
    """Give an alias to a version that is better than the one that has it; what came of it is a tag of the version."""
    try:
        champion = client.get_model_version_by_alias(version.name, alias)
    except MlflowException:
        champion = None
    if champion is not None and int(champion.version) == int(version.version):
        return
    wins, reason = (True, "there was none before") if champion is None else _compare(champion, run_id, kind)
    if wins:
        client.set_registered_model_alias(version.name, alias, version.version)
    outcome = f"{'promoted to' if wins else 'not promoted to'} {alias}: {reason}"
    client.set_model_version_tag(version.name, version.version, "promotion", outcome)
    logger.info("model registry: %s version %s is %s", version.name, version.version, outcome)


def _compare(champion: ModelVersion, run_id: str, kind: str) -> tuple[bool, str]:
    """Return whether answers are better than the champion's to the same samples, beyond chance, and the figures."""
    theirs, ours = (_answers(run, kind) for run in (champion.tags.get(EVALUATION, ""), run_id))
    if theirs is None or ours is None:
        return False, f"the answers of version {champion.version}, or of this one, are not in MLflow"
    both = pd.concat([theirs, ours], axis=1, join="inner", keys=["theirs", "ours"])
    if both.empty:
        return False, f"version {champion.version} was evaluated on other samples ({kind})"
    gains = (both["ours"] - both["theirs"]).astype(float).to_numpy()
    low, high = bootstrap_interval(gains)
    figures = f"{gains.mean():+.4f} [{low:+.4f}, {high:+.4f}] on {len(gains)} samples ({kind})"
    return low > 0, f"{figures} against version {champion.version}"


def _answers(run_id: str, kind: str) -> pd.Series | None:
    """Return the score of every sample of a kind that a run has, by the sample; `None` where it has no answers."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = download_artifacts(run_id=run_id, artifact_path=PREDICTIONS, dst_path=folder)
            table = pd.read_parquet(BytesIO(Path(path).read_bytes()))
    except (MlflowException, OSError):
        return None
    return rows_of(table, kind).set_index(_SAMPLE)["trained_score"]


def _find(client: MlflowClient, source_run: str, weights: str) -> LoggedModel | None:
    experiment = client.get_run(source_run).info.experiment_id
    condition = f"source_run_id = '{source_run}' AND tags.weights = '{weights}'"
    return next(iter(client.search_logged_models([experiment], condition)), None)


def _create(
    client: MlflowClient, name: str, pointer: dict[str, str], parameters: dict[str, str], source_run: str
) -> LoggedModel:
    experiment = client.get_run(source_run).info.experiment_id
    model = client.create_logged_model(
        experiment, _NOT_IN_NAMES.sub("_", name), source_run, pointer, parameters, _MODEL_TYPE
    )
    from mlflow.models import Model
    from mlflow.pyfunc import add_to_model

    about = Model(model_id=model.model_id, signature=_signature())
    add_to_model(about, loader_module=_LOADER, data=POINTER)
    with tempfile.TemporaryDirectory() as folder:
        about.save(Path(folder) / "MLmodel")
        (Path(folder) / POINTER).write_text(json.dumps(pointer, indent=2), encoding="utf-8")
        client.log_model_artifacts(model.model_id, folder)
    return client.finalize_logged_model(model.model_id, "READY")


def _signature() -> ModelSignature:
    """Return what the model is asked and says: a question, with an image or without."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text = DataType.string
    asked = Schema([ColSpec(text, "question"), ColSpec(text, "image", required=False)])
    options = ParamSchema([ParamSpec("max_new_tokens", DataType.long, 128)])
    return ModelSignature(asked, Schema([ColSpec(text)]), options)

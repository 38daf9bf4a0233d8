"""One MLflow run: what is recorded, within MLflow's limits and without secrets."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_SOURCE_NAME, MLFLOW_USER
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, MAX_PARAM_VAL_LENGTH

from qvl_pipeline.secrets import file_without_secrets, without_secrets
from qvl_pipeline.storage.room import room_for
from qvl_pipeline.tracking.flattening import numbers, parameter_leaves
from qvl_pipeline.tracking.lineage.data_version import data_version
from qvl_pipeline.tracking.mlflow.chain import chain_above
from qvl_pipeline.tracking.mlflow.known import check_not_emptied, killed, note_begun, note_ended
from qvl_pipeline.tracking.mlflow.outbox import Outbox
from qvl_pipeline.tracking.mlflow.server import database, unusable, use_server

logger = logging.getLogger(__name__)

# A prediction table of a large eval split belongs to DVC, not into an artifact store.
MAX_ARTIFACT_BYTES = 50 * 2**20
_TEXTS = {".csv", ".html", ".json", ".jsonl", ".log", ".md", ".txt", ".yaml", ".yml"}
# Tag of a training: how its newest evaluation differs from the parameters in its row.
OTHERWISE = "evaluated_otherwise"
# Without it, MLflow opens an experiment on its page for traces of language model applications, not on the runs.
_OF_TRAININGS = {"mlflow.experimentKind": "custom_model_development"}


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
    if tracking_uri.startswith("sqlite:///"):
        check_not_emptied(tracking_uri, database(tracking_uri))
    local = tracking_uri.startswith("sqlite:")
    with room_for(database(tracking_uri)) if local else contextlib.nullcontext():
        run_id = _begin(tracking_uri, experiment, artifact_location if local else None, name)
    with going_on("which runs go on"):
        _end_killed(tracking_uri)
        note_begun(run_id, tracking_uri)
    return MlflowRun(run_id)


def _begin(tracking_uri: str, experiment: str, artifact_location: str | None, name: str) -> str:
    use_server(tracking_uri)
    try:
        experiment_id = _experiment_id(experiment, Path(artifact_location).as_uri() if artifact_location else None)
        mlflow.set_experiment(experiment_id=experiment_id)
        command = without_secrets(" ".join(["kedro", *sys.argv[1:]]))
        tags = {MLFLOW_USER: _user(), MLFLOW_SOURCE_NAME: command}
        run_id = mlflow.MlflowClient().create_run(experiment_id, tags=tags, run_name=name).info.run_id
        # Given a run, MLflow neither continues one it finds in MLFLOW_RUN_ID nor imports IPython to look for more.
        mlflow.start_run(run_id, nested=True)
    except MlflowException as error:
        raise unusable(error, "cannot record this run") from error
    return run_id


def _end_killed(tracking_uri: str) -> None:
    """Mark runs as killed whose process was, with no time to say so itself."""
    for run_id in killed(tracking_uri):
        with contextlib.suppress(MlflowException):  # it was deleted
            run = mlflow.MlflowClient().get_run(run_id)
            if run.info.status == "RUNNING":
                MlflowRun(run_id).finish("KILLED", above=chain_above(run))
                logger.info("MLflow run %s was killed, and is marked so now", run_id)


def _experiment_id(name: str, artifact_location: str | None) -> str:
    client = mlflow.MlflowClient()
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location, tags=_OF_TRAININGS)
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


def metric_entries(values: dict[str, Any], step: int = 0, seconds: float | None = None) -> list[Metric]:
    """Return the numbers in nested `values` as metrics, their keys joined by `/`.

    Args:
        values: Nested values; what is no number is left out.
        step: Optimizer step.
        seconds: When they were measured, since 1970; by default now.
    """
    at_ms = int(1000 * (time.time() if seconds is None else seconds))
    return [Metric(valid_name(key), float(value), at_ms, step) for key, value in numbers(values, "/").items()]


def valid_name(name: str) -> str:
    """Return `name` as MLflow takes it; different names stay different.

    Characters that it refuses become `_`. A part between slashes that is changed, and a name that is cut, end in the
    start of a digest: `a+b` and `a,b` would be one metric otherwise, and the second would overwrite the first.
    """
    valid = "/".join(map(_valid_part, name.split("/")))
    if len(valid) <= MAX_ENTITY_KEY_LENGTH:
        return valid
    return f"{valid[: MAX_ENTITY_KEY_LENGTH - 7]}-{_short_digest(name)}"


def _valid_part(part: str) -> str:
    valid = re.sub(r"[^\w. -]", "_", part)
    # MLflow takes a name for a path, and none that has a shorter form.
    return part if valid == part and part not in ("", ".", "..") else f"{valid}-{_short_digest(part)}"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


@contextlib.contextmanager
def going_on(what: str) -> Iterator[None]:
    """Let a failure to record `what` be a warning: work that took hours is not lost to a tracking server."""
    try:
        yield
    except (MlflowException, OSError) as error:
        logger.warning("MLflow does not have %s: %s", what, without_secrets(str(error)))


def log_json_file(path: Path) -> None:
    """Log a JSON file, without secrets, as an artifact of the active run; one that is not taken is sent later."""
    if active := mlflow.active_run():
        with going_on(f"'{path.name}'"):
            values = without_secrets(json.loads(path.read_text(encoding="utf-8")))
            MlflowRun(active.info.run_id).log_text(json.dumps(values, indent=2), path.name)


def _parameter_texts(blocks: dict[str, Any]) -> dict[str, str]:
    leaves = parameter_leaves(without_secrets(blocks))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves}


class MlflowRun:
    """A run of this process. Written through a client, so that it does not matter in which thread.

    What the server does not take now is kept, and sent at the end of the run or later (`tracking/mlflow/outbox.py`).
    """

    def __init__(self, run_id: str) -> None:
        """Take over the run `run_id`."""
        self.id = run_id
        self._outbox = Outbox()
        self._written = {run_id}

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Set tags."""
        texts = {valid_name(key): str(without_secrets(value)) for key, value in tags.items()}
        self._send("tags", {"kind": "tags", "texts": texts})

    def log_parameters(self, blocks: dict[str, Any], run_id: str | None = None) -> None:
        """Log nested parameters under flat names (`train.learning_rate`), to this or to another run; lists are JSON.

        A value that is too long for MLflow is cut; its name is then in the tag `parameters_cut` and in the log.
        """
        texts = _parameter_texts(blocks)
        short = {valid_name(key): text[:MAX_PARAM_VAL_LENGTH] for key, text in texts.items()}
        self._send("parameters", {"kind": "parameters", "texts": short}, run_id=run_id)
        if run_id:
            return
        if cut := [key for key, text in texts.items() if len(text) > MAX_PARAM_VAL_LENGTH]:
            self.set_tags({"parameters_cut": ", ".join(cut)})
            logger.warning("MLflow shows only the start of %s; parameters.yml of the run has all of it", ", ".join(cut))

    def complete_parameters(self, blocks: dict[str, Any], run_id: str) -> None:
        """Give another run, which gets scores of this one, the parameters that they depend on and that it lacks.

        Parameters are never changed: what a later evaluation has otherwise is in the tag `OTHERWISE`.
        """
        texts = {valid_name(key): text[:MAX_PARAM_VAL_LENGTH] for key, text in _parameter_texts(blocks).items()}
        self._send("parameters", {"kind": "complete", "texts": texts, "otherwise": OTHERWISE}, run_id=run_id)

    def log_yaml(self, values: dict[str, Any], name: str) -> None:
        """Log `values` as an artifact in YAML."""
        self.log_text(yaml.safe_dump(without_secrets(values), sort_keys=False, allow_unicode=True), name)

    def log_text(self, text: str, name: str) -> None:
        """Log a text as an artifact."""
        self._send(f"'{name}'", {"kind": "text", "text": text, "name": name})

    def log_metrics(self, values: dict[str, Any], run_id: str | None = None) -> None:
        """Log the numbers in nested `values` (`trained/video/exact_match`), to this or to another run."""
        points = [(point.key, point.value, point.timestamp, point.step) for point in metric_entries(values)]
        self._send("metrics", {"kind": "metrics", "points": points}, run_id=run_id)

    def log_artifact(self, path: Path) -> None:
        """Log a file, unless it is larger than `MAX_ARTIFACT_BYTES`; a text without the secrets that it may hold."""
        if (size := path.stat().st_size) > MAX_ARTIFACT_BYTES:
            logger.info("%s (%d MiB) is not copied into MLflow", path.name, size // 2**20)
            return
        text = path.read_text(encoding="utf-8") if path.suffix in _TEXTS else ""
        if (masked := file_without_secrets(text)) != text:
            self.log_text(masked, path.name)
        else:
            self._send(f"'{path.name}'", {"kind": "artifact", "name": path.name}, path)

    def _send(self, what: str, entry: dict[str, Any], file: Path | None = None, run_id: str | None = None) -> None:
        self._written.add(run_id or self.id)
        self._outbox.send(run_id or self.id, what, entry, file)

    def log_input(self, name: str, path: Path, context: str) -> None:
        """Log a file or folder that the run reads, with DVC's md5 of it and whether DVC has it."""
        version = data_version(path)
        self._log_dataset(name, version.digest, str(path), {MLFLOW_DATASET_CONTEXT: context, "version": version.origin})

    def log_source(self, name: str, path: str, hashes: dict[str, str]) -> None:
        """Log a declared source of raw data; one behind a URL has the version of its copies, by their sha256."""
        if Path(path).exists():
            self.log_input(name, Path(path), context="raw data")
        else:
            digest = hashlib.sha256(json.dumps(sorted(hashes.values())).encode()).hexdigest()[:32]
            tags = {MLFLOW_DATASET_CONTEXT: "raw data", "version": "sha256 of the files that were read"}
            self._log_dataset(name, f"sha:{digest}", path, tags)

    def _log_dataset(self, name: str, digest: str, uri: str, tags: dict[str, str]) -> None:
        source = json.dumps({"uri": without_secrets(uri)})
        self._send(
            f"the input '{name}'", {"kind": "input", "name": name, "digest": digest, "source": source, "tags": tags}
        )

    def log_pointer(self, pointer: dict[str, str]) -> None:
        """Log where the model is that this run trained, `model/pointer.json`; the weights stay where they are."""
        self.log_text(json.dumps(pointer, indent=2), "model/pointer.json")

    def log_model(self, name: str, pointer: dict[str, str], blocks: dict[str, Any], made_by: str | None = None) -> None:
        """Let MLflow have a model, once, in its table of models.

        Args:
            name: Name of the model.
            pointer: What `pointer_to` returns.
            blocks: Parameters that made it.
            made_by: The run that made it, by default this one.
        """
        self._send_model(name, pointer, blocks, made_by, [], None)

    def log_model_scores(
        self,
        name: str,
        pointer: dict[str, str],
        blocks: dict[str, Any],
        made_by: str | None,
        scores: dict[str, Any],
        data: tuple[str, Path] | None,
    ) -> None:
        """Log scores of a model, `eval/<kind>/<metric>`, by which models are ranked; of a new one as `log_model` does.

        Args:
            name: Name of the model.
            pointer: What `pointer_to` returns.
            blocks: Parameters that made it.
            made_by: The run that made it, by default this one.
            scores: By kind and metric.
            data: Name and file of the samples that they are on.
        """
        points = [(point.key, point.value, point.timestamp, point.step) for point in metric_entries({"eval": scores})]
        self._send_model(name, pointer, blocks, made_by, points, data and (data[0], data_version(data[1]).digest))

    def _send_model(
        self,
        name: str,
        pointer: dict[str, str],
        blocks: dict[str, Any],
        made_by: str | None,
        points: list[tuple[str, float, int, int]],
        dataset: tuple[str, str] | None,
    ) -> None:
        texts = {valid_name(key): text[:MAX_PARAM_VAL_LENGTH] for key, text in _parameter_texts(blocks).items()}
        entry = {"kind": "model", "name": name, "pointer": pointer, "parameters": texts}
        entry |= {"source_run": made_by or self.id, "points": points, "dataset": dataset}
        self._send(f"the model '{name}'", entry)

    def register(
        self,
        registered_name: str,
        pointer: dict[str, str],
        made_by: str | None,
        alias: str | None,
        promote: dict[str, str] | None,
    ) -> None:
        """Make a model that this run evaluated a version in the registry; see `models.register`."""
        entry = {"kind": "register", "registered_name": registered_name, "pointer": pointer}
        entry |= {"source_run": made_by or self.id, "alias": alias, "promote": promote}
        self._send(f"a version of '{registered_name}'", entry)

    def finish(self, status: str, above: str | None = None) -> None:
        """End the run as `FINISHED`, `FAILED` or `KILLED`, after another try to send what was kept.

        Args:
            status: How it ended.
            above: The run of the chain that it is a stage of; so far, that ended in the same way.
        """
        ended = int(1000 * time.time())
        self._outbox.send_kept(self._written)
        active = mlflow.active_run()
        if active is not None and active.info.run_id == self.id:
            with contextlib.suppress(MlflowException, OSError):  # no longer active in any case; the end is sent below
                mlflow.end_run(status)
        for run_id in [self.id, *([above] if above else [])]:
            self._send("the end of the run", {"kind": "status", "status": status, "end_time": ended}, run_id=run_id)
        note_ended(self.id)

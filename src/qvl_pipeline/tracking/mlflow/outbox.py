"""What the tracking server did not take of a run: kept in files, in the order in which it was made, and sent later.

The curves of training have a way of their own (`sinks.py`, `unsent.py`); this is for the rest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

from qvl_pipeline.secrets import without_secrets
from qvl_pipeline.tracking.mlflow.models import log_model, register

logger = logging.getLogger(__name__)

FOLDER = Path("data/unsent")
ENTRY = "entry.json"
# Asked for something that is not there, or given something it cannot take, a server gives the same answer later.
_FINAL = (400, 404)
# After a failure all is kept for so long without asking: a server that does not answer may cost a minute each time.
_PAUSE_S = 60.0


class Outbox:
    """Sends entries of runs to MLflow, or keeps them in a folder.

    An entry is JSON: its `kind`, and the arguments of the function of that name in this module. Whatever was kept may
    have been carried out all the same, so each is such that doing it twice does nothing more: of metrics, databases
    behind MLflow keep equal entries once, and those of an entry have the time when it was made.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        """Keep what is not taken in `folder`."""
        self._folder = folder.absolute()
        self._next_try = 0.0

    def send(self, run_id: str, what: str, entry: dict[str, Any], file: Path | None = None) -> None:
        """Send an entry to a run, or keep it.

        Args:
            run_id: The run.
            what: What it is, for a warning.
            entry: The entry, without secrets.
            file: The file that belongs to an entry of kind `artifact`.

        Raises:
            MlflowException: The server will never take it.
        """
        if time.monotonic() < self._next_try or self._others_wait(run_id):
            self._keep(run_id, entry, file)
            return
        try:
            _deliver(run_id, entry, file)
        except (MlflowException, OSError) as error:
            if _is_final(error):
                raise
            self._next_try = time.monotonic() + _PAUSE_S
            self._keep(run_id, entry, file)
            logger.warning(
                "MLflow does not take %s now; it gets this and what follows at the end of the run, or by `kedro run "
                "--pipelines sync_metrics`: %s",
                what,
                without_secrets(str(error)),
            )

    def _others_wait(self, run_id: str) -> bool:
        """Send what was kept of a run, which goes first: a version is made of a model; return whether any is left."""
        if not any((self._folder / run_id).glob(f"*/{ENTRY}")):
            return False
        return bool(self.send_kept({run_id})[run_id]["left"])

    def _keep(self, run_id: str, entry: dict[str, Any], file: Path | None) -> None:
        folder = self._folder / run_id / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        if file is not None:
            shutil.copy2(file, folder)
        partial = folder / f".{ENTRY}.partial"
        partial.write_text(json.dumps(entry), encoding="utf-8")
        partial.rename(folder / ENTRY)  # from here on, it is there

    def send_kept(self, runs: Collection[str] | None = None) -> dict[str, dict[str, int]]:
        """Send what was kept, in order; a run that does not take an entry waits with those after it.

        Args:
            runs: Of these runs; by default of all.

        Returns:
            By MLflow run, of those with kept entries: how many were `sent`, and how many are `left`.
        """
        outcome = {}
        for folder in sorted(self._folder.glob("*")):
            kept = sorted(path.parent for path in folder.glob(f"*/{ENTRY}"))
            if kept and (runs is None or folder.name in runs):
                left = _send_all(folder.name, kept)
                outcome[folder.name] = {"sent": len(kept) - left, "left": left}
        self._next_try = time.monotonic() + _PAUSE_S if any(run["left"] for run in outcome.values()) else 0.0
        return outcome


def _send_all(run_id: str, kept: list[Path]) -> int:
    """Send entries of a run; return how many are left."""
    for number, path in enumerate(kept):
        entry = json.loads((path / ENTRY).read_text(encoding="utf-8"))
        try:
            _deliver(run_id, entry, path / entry["name"] if entry["kind"] == "artifact" else None)
        except (MlflowException, OSError) as error:
            logger.warning("MLflow does not take what is in %s: %s", path.parent, without_secrets(str(error)))
            return len(kept) - number
        shutil.rmtree(path)
    with contextlib.suppress(OSError):  # more has come meanwhile
        kept[0].parent.rmdir()
    return 0


def _is_final(error: Exception) -> bool:
    return isinstance(error, MlflowException) and error.get_http_status_code() in _FINAL


def _deliver(run_id: str, entry: dict[str, Any], file: Path | None) -> None:
    arguments = {key: value for key, value in entry.items() if key != "kind"}
    if file is not None:
        arguments["name"] = file
    _KINDS[entry["kind"]](MlflowClient(), run_id, **arguments)


def _metrics(client: MlflowClient, run_id: str, points: list[tuple[str, float, int, int]]) -> None:
    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def _parameters(client: MlflowClient, run_id: str, texts: dict[str, str]) -> None:
    client.log_batch(run_id, params=[Param(*item) for item in texts.items()])


def _complete(client: MlflowClient, run_id: str, texts: dict[str, str], otherwise: str) -> None:
    """Add the parameters that a run lacks; those that it has with other values are named in the tag `otherwise`."""
    there = client.get_run(run_id).data
    if missing := {key: text for key, text in texts.items() if key not in there.params}:
        _parameters(client, run_id, missing)
    other = ", ".join(f"{key}={text}" for key, text in texts.items() if there.params.get(key, text) != text)
    if other or otherwise in there.tags:
        _tags(client, run_id, {otherwise: other[:MAX_TAG_VAL_LENGTH]})


def _tags(client: MlflowClient, run_id: str, texts: dict[str, str]) -> None:
    client.log_batch(run_id, tags=[RunTag(*item) for item in texts.items()])


def _input(client: MlflowClient, run_id: str, name: str, digest: str, source: str, tags: dict[str, str]) -> None:
    dataset = Dataset(name, digest, source_type="local", source=source)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(*tag) for tag in tags.items()])])


def _text(client: MlflowClient, run_id: str, text: str, name: str) -> None:
    client.log_text(run_id, text, name)


def _artifact(client: MlflowClient, run_id: str, name: Path) -> None:
    client.log_artifact(run_id, str(name))


def _status(client: MlflowClient, run_id: str, status: str, end_time: int) -> None:
    client.set_terminated(run_id, status, end_time)


_KINDS = {
    "metrics": _metrics,
    "parameters": _parameters,
    "complete": _complete,
    "tags": _tags,
    "input": _input,
    "text": _text,
    "artifact": _artifact,
    "model": log_model,
    "register": register,
    "status": _status,
}

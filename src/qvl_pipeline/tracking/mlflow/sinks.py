"""Trackers that receive the training metrics, by following the file the engine writes them to.

The engine knows no tracker. It appends rows to `metrics.jsonl`; a sink reads what is new there and sends it on, in a
thread of its own. A tracker that is slow or down delays nothing, and gets the rows it missed when it is back; what it
has not got by the end is sent by `kedro run --pipelines sync_metrics` (`tracking/mlflow/unsent.py`).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qvl_pipeline.errors import UserError
from qvl_pipeline.secrets import without_secrets
from qvl_pipeline.storage.whole import write_whole
from qvl_pipeline.tracking.flattening import numbers

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# What a row says about itself; the rest are metrics.
_NOT_METRICS = ("step", "max_steps", "time")
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0


class MetricsSink:
    """Sends every row of a metrics file to one tracker, each step once.

    The last step sent is kept in a file beside the metrics, by run: a sink of the same run goes on from there, and a
    new run, which continues a training from its checkpoint, gets the rows from before too, so that its curve is whole.
    """

    def __init__(self, tracker: str, run_id: str, metrics_path: Path, send: Callable[[list[Row]], None]) -> None:
        """Follow `metrics_path`, which need not exist yet.

        Args:
            tracker: Name of the tracker.
            run_id: Run of the tracker that the rows belong to.
            metrics_path: JSON lines, one row for every logged step, `step` among them.
            send: Sends rows to the tracker. It may raise anything, and is then called again with the same rows: what
                of them the tracker got nevertheless, it has to find out itself.
        """
        self._tracker = tracker
        self._run_id = run_id
        self._metrics_path = metrics_path
        self._send = send
        self._progress_path = progress_path(metrics_path, tracker)
        self._offset = 0
        self._last_step = self._load_progress()
        self._save_progress()  # from now on, what this run did not get is known to be unsent
        self._thread: threading.Thread | None = None
        self._retry_after_s = _FIRST_RETRY_S
        self._next_try = 0.0
        self._warned = False

    def poll(self) -> None:
        """Send the rows that are new, in the background; returns at once. After a failure, it waits before the next."""
        if time.monotonic() >= self._next_try and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._send_new_rows, name=f"{self._tracker} sink", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 30.0) -> int:
        """Send the last rows, for `timeout_s` seconds at most; return how many the tracker did not get."""
        if self._thread is not None:
            self._thread.join(timeout_s / 2)
        self._next_try = 0.0
        self.poll()
        self._thread.join(timeout_s / 2)
        left = len(self._new_rows()[0])
        if left:
            logger.warning("%s did not get the last %d rows of %s", self._tracker, left, self._metrics_path)
        return left

    def _send_new_rows(self) -> None:
        rows, end = self._new_rows()
        if not rows:
            return
        try:
            self._send(rows)
        except Exception as error:  # Whatever a tracker raises: the rows stay in the file, and training goes on.
            if not self._warned:
                reason = without_secrets(str(error))
                logger.warning("%s takes no metrics at the moment; they are sent later: %s", self._tracker, reason)
            self._warned = True
            self._next_try = time.monotonic() + self._retry_after_s
            self._retry_after_s = min(2 * self._retry_after_s, _LAST_RETRY_S)
        else:
            self._offset, self._last_step = end, rows[-1]["step"]
            self._retry_after_s = _FIRST_RETRY_S
            self._save_progress()

    def _new_rows(self) -> tuple[list[Row], int]:
        """Return the complete rows of steps that were not sent yet, and the offset where they end."""
        if not self._metrics_path.exists():
            return [], 0
        with self._metrics_path.open("rb") as file:
            # A training that is resumed rewrites the file up to its checkpoint; the old offset then means nothing.
            file.seek(max(self._offset - 1, 0))
            start = self._offset if self._offset and file.read(1) == b"\n" else 0
            file.seek(start)
            complete, newline, _ = file.read().rpartition(b"\n")
        rows = [row for row in map(json.loads, complete.splitlines()) if row["step"] > self._last_step]
        return rows, start + len(complete) + len(newline)

    def _load_progress(self) -> int:
        if not self._progress_path.exists():
            return -1
        progress = json.loads(self._progress_path.read_text(encoding="utf-8"))
        return progress["step"] if progress["run_id"] == self._run_id else -1

    def _save_progress(self) -> None:
        write_whole(self._progress_path, json.dumps({"run_id": self._run_id, "step": self._last_step}))


class SendToMlflow:
    """Sends rows to an MLflow run, every number once, whatever happens on the way.

    A request that failed may have been carried out all the same. So after a failure, and at first (the process before
    may have ended between sending and noting it down), the server is asked up to which step it has each metric. And
    should a request that was given up reach the server later still, its entries have the time of the row and not of the
    request: databases behind MLflow keep equal entries once.
    """

    def __init__(self, run_id: str) -> None:
        """Send to the run `run_id` of the current tracking server."""
        import mlflow

        self._run_id = run_id
        self._client = mlflow.MlflowClient()
        self._certain = False

    def __call__(self, rows: list[Row]) -> None:
        """Send rows, whose steps rise."""
        from qvl_pipeline.tracking.mlflow.run import metric_entries

        entries = [
            entry for row in rows for entry in metric_entries(training_metrics(row), row["step"], row.get("time"))
        ]
        if not self._certain:
            stored = self._client.get_run(self._run_id).data.to_proto().metrics
            last = {metric.key: metric.step for metric in stored}
            entries = [entry for entry in entries if entry.step > last.get(entry.key, -1)]
        self._certain = False
        self._client.log_batch(self._run_id, metrics=entries)
        self._certain = True


def progress_path(metrics_path: Path, tracker: str) -> Path:
    """Return the file that holds which run of `tracker` gets the rows of `metrics_path`, and its last step sent."""
    return metrics_path.with_name(f"{metrics_path.name}.{tracker}")


def make_sinks(report_to: list[str], metrics_path: Path, run_name: str) -> list[MetricsSink]:
    """Return a sink for every tracker in `report_to`.

    Args:
        report_to: Any of `mlflow` (the active run), `tensorboard` (a folder beside `metrics_path`), `wandb`; or `none`.
        metrics_path: The metrics file to follow.
        run_name: Name of the run, for trackers that start one of their own.

    Raises:
        UserError: A tracker is not installed, or does not start.
    """
    makers = {"mlflow": _mlflow_sink, "tensorboard": _tensorboard_sink, "wandb": _wandb_sink}
    return [makers[tracker](metrics_path, run_name) for tracker in report_to if tracker != "none"]


def check_installed(report_to: list[str]) -> None:
    """Refuse trackers whose package is not here: `make_sinks` would, too, but only after hours of preparing data.

    Raises:
        UserError: Names the tracker and how to install it.
    """
    for tracker in report_to:
        if tracker in ("tensorboard", "wandb"):
            _import(tracker)


def training_metrics(row: Row) -> dict[str, float]:
    """Return the numbers of a row under the names that all trackers show (`train/loss`), without steps."""
    return {f"train/{name}": value for name, value in numbers(row, "/").items() if name not in _NOT_METRICS}


def _mlflow_sink(metrics_path: Path, run_name: str) -> MetricsSink:
    import mlflow

    active = mlflow.active_run()
    if active is None:
        raise UserError("report_to names 'mlflow', but no MLflow run is active: train with `kedro run`")
    return MetricsSink("mlflow", active.info.run_id, metrics_path, SendToMlflow(active.info.run_id))


def _tensorboard_sink(metrics_path: Path, run_name: str) -> MetricsSink:
    _import("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(metrics_path.with_name("tensorboard"))

    def send(rows: list[Row]) -> None:
        for row in rows:
            for name, value in training_metrics(row).items():
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return MetricsSink("tensorboard", "tensorboard", metrics_path, send)


def _wandb_sink(metrics_path: Path, run_name: str) -> MetricsSink:
    wandb = _import("wandb")
    try:
        run = wandb.init(project="qvl_pipeline", name=run_name, dir=metrics_path.parent)
    except wandb.Error as error:
        raise UserError(f"report_to names 'wandb', which does not start: {error}") from error

    def send(rows: list[Row]) -> None:
        for row in rows:
            run.log(training_metrics(row), step=row["step"])

    return MetricsSink("wandb", run.id, metrics_path, send)


def _import(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"report_to names '{package}', which is not installed: `uv pip install {package}`, or take it out of "
            "train.report_to"
        ) from error

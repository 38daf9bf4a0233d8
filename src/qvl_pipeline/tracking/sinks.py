"""Trackers that receive the training metrics, by following the file the engine writes them to.

The engine knows no tracker. It appends rows to `metrics.jsonl`; a sink reads what is new there and sends it on, in a
thread of its own. A tracker that is slow or down delays nothing, and gets the rows it missed when it is back.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.lineage import numbers, without_secrets

logger = logging.getLogger(__name__)

Row = dict[str, Any]


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
            send: Sends rows to the tracker. It may raise anything, and is then called again with the same rows.
        """
        self._tracker = tracker
        self._run_id = run_id
        self._metrics_path = metrics_path
        self._send = send
        self._progress_path = metrics_path.with_name(f"{metrics_path.name}.{tracker}")
        self._offset = 0
        self._last_step = self._load_progress()
        self._thread: threading.Thread | None = None
        self._warned = False

    def poll(self) -> None:
        """Send the rows that are new, in the background; returns at once."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._send_new_rows, name=f"{self._tracker} sink", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 30.0) -> None:
        """Send the last rows, waiting for a slow tracker `timeout_s` seconds at most."""
        if self._thread is not None:
            self._thread.join(timeout_s / 2)
        self.poll()
        self._thread.join(timeout_s / 2)
        if left := self._new_rows()[0]:
            logger.warning("%s did not get the last %d rows of %s", self._tracker, len(left), self._metrics_path)

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
        else:
            self._offset, self._last_step = end, rows[-1]["step"]
            self._progress_path.write_text(json.dumps({"run_id": self._run_id, "step": self._last_step}))

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
        progress = json.loads(self._progress_path.read_text())
        return progress["step"] if progress["run_id"] == self._run_id else -1


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


def training_metrics(row: Row) -> dict[str, float]:
    """Return the numbers of a row under the names that all trackers show (`train/loss`), without steps."""
    return {f"train/{name}": value for name, value in numbers(row, "/").items() if name not in ("step", "max_steps")}


def _mlflow_sink(metrics_path: Path, run_name: str) -> MetricsSink:
    import mlflow

    from qvl_pipeline.tracking.mlflow_run import metric_entries

    active = mlflow.active_run()
    if active is None:
        raise UserError("report_to names 'mlflow', but no MLflow run is active: train with `kedro run`")
    run_id, client = active.info.run_id, mlflow.MlflowClient()

    def send(rows: list[Row]) -> None:
        entries = [entry for row in rows for entry in metric_entries(training_metrics(row), step=row["step"])]
        client.log_batch(run_id, metrics=entries)

    return MetricsSink("mlflow", run_id, metrics_path, send)


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

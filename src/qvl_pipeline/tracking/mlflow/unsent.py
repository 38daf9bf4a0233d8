"""Training metrics that the tracking server did not get while they were made: kept, found and sent later.

A run's `metrics.jsonl` and, beside it, how far MLflow got stay in the scratch folder after the model is published.
Before the same training runs again and cuts or deletes them, what is unsent moves to `scratch/unsent/<MLflow run>/`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from qvl_pipeline.errors import UserError
from qvl_pipeline.locks import holding
from qvl_pipeline.tracking.mlflow.sinks import MetricsSink, SendToMlflow, progress_path

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
UNSENT = "unsent"


@contextlib.contextmanager
def only_sender(folder: Path) -> Iterator[None]:
    """Hold a run's folder: two senders of the same rows would not know of each other.

    The lock is the operating system's, and ends with the process however that ends. On a file system without locks
    (some of clusters) it is done without.

    Raises:
        UserError: Another process holds it.
    """
    with contextlib.ExitStack() as held:
        try:
            locked = held.enter_context(holding(folder))
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use: another process trains there, or sends its metrics") from error
        if not locked:
            logger.info("%s cannot be locked: do not run sync_metrics while this training runs", folder)
        yield


def keep_unsent(folder: Path) -> None:
    """Copy what MLflow has not got of the rows in `folder` to a place where no later training touches them."""
    metrics, progress = folder / METRICS, progress_path(folder / METRICS, "mlflow")
    if not metrics.exists() or not progress.exists() or not _unsent(metrics, progress):
        return
    kept = folder.parent / UNSENT / json.loads(progress.read_text(encoding="utf-8"))["run_id"]
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy2(metrics, kept)
    shutil.copy2(progress, kept)


def send_unsent(models: Path) -> dict[str, dict[str, int]]:
    """Send what MLflow has not got of all trainings below `models`; does nothing more when called again.

    Args:
        models: Folder of the models of all profiles, each with its `scratch`.

    Returns:
        By MLflow run, of those with unsent rows: how many were `sent`, and how many are `left`.
    """
    outcome = {}
    for progress in sorted(models.glob(f"*/scratch/**/{progress_path(Path(METRICS), 'mlflow')}")):
        folder, run_id = progress.parent, json.loads(progress.read_text(encoding="utf-8"))["run_id"]
        if not (unsent := _unsent(folder / METRICS, progress)):
            continue
        try:
            with only_sender(folder):
                left = MetricsSink("mlflow", run_id, folder / METRICS, SendToMlflow(run_id)).close(timeout_s=600)
        except UserError as error:
            logger.warning("%s", error)
            continue
        outcome[run_id] = {"sent": unsent - left, "left": left}
        if not left and folder.parent.name == UNSENT:
            shutil.rmtree(folder)
    return outcome


def _unsent(metrics: Path, progress: Path) -> int:
    """Count the complete rows after the last step sent."""
    if not metrics.exists():
        return 0
    last = json.loads(progress.read_text(encoding="utf-8"))["step"]
    return sum(json.loads(line)["step"] > last for line in metrics.read_text(encoding="utf-8").split("\n")[:-1])

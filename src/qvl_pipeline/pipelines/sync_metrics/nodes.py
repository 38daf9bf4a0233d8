"""Nodes of the pipeline `sync_metrics`."""

from __future__ import annotations

import logging
from pathlib import Path

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.mlflow.unsent import send_unsent

logger = logging.getLogger(__name__)

MODELS = Path("data/06_models")


def sync_metrics() -> dict[str, dict[str, int]]:
    """Send what MLflow has not got of all runs: rows of trainings' curves, and whatever else was kept.

    Returns:
        Rows and entries `sent` and `left` by MLflow run; empty when nothing was unsent.

    Raises:
        UserError: The server did not take all of them; they are kept.
    """
    from qvl_pipeline.tracking.mlflow.outbox import Outbox  # imports MLflow

    outcome = send_unsent(MODELS)
    for run_id, entries in Outbox().send_kept().items():
        rows = outcome.get(run_id, {"sent": 0, "left": 0})
        outcome[run_id] = {key: rows[key] + entries[key] for key in entries}
    for run_id, counts in outcome.items():
        logger.info("MLflow run %s: %d sent, %d left", run_id, counts["sent"], counts["left"])
    if left := [run_id for run_id, counts in outcome.items() if counts["left"]]:
        raise UserError(
            f"MLflow did not take all of {', '.join(left)}: see the warnings above, and run it again when the server "
            "that has these runs answers"
        )
    logger.info("MLflow has all of every run" if not outcome else "MLflow now has all of every run")
    return outcome

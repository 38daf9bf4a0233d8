"""Nodes of the pipeline `sync_metrics`."""

from __future__ import annotations

import logging
from pathlib import Path

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.unsent import send_unsent

logger = logging.getLogger(__name__)

MODELS = Path("data/06_models")


def sync_metrics() -> dict[str, dict[str, int]]:
    """Send the unsent rows of all profiles' trainings to MLflow.

    Returns:
        Rows `sent` and `left` by MLflow run; empty when nothing was unsent.

    Raises:
        UserError: The server did not take all of them; they are kept.
    """
    outcome = send_unsent(MODELS)
    for run_id, rows in outcome.items():
        logger.info("MLflow run %s: %d rows sent, %d left", run_id, rows["sent"], rows["left"])
    if left := [run_id for run_id, rows in outcome.items() if rows["left"]]:
        raise UserError(
            f"MLflow did not take all metrics of {', '.join(left)}: see the warnings above, and run it again when the "
            "server that has these runs answers"
        )
    logger.info("MLflow has all metrics" if not outcome else "MLflow now has all metrics")
    return outcome

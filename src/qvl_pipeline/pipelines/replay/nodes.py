"""Nodes of the pipeline `replay`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from qvl_pipeline.config import ReplayConfig
from qvl_pipeline.errors import UserError

logger = logging.getLogger(__name__)

MAX_SHOWN = 20


def repeat(replay: ReplayConfig) -> dict[str, Any]:
    """Repeat a run in a git worktree.

    Args:
        replay: Parameters of the pipeline.

    Returns:
        The report; see `tracking.replay`.

    Raises:
        UserError: It cannot be repeated, or its repetition failed.
    """
    from qvl_pipeline.tracking.mlflow.server import answering
    from qvl_pipeline.tracking.replay.repeat import replay_run

    if not replay.run_id:
        raise UserError("which run? Name it by its id in MLflow: kedro run --pipelines replay --params run_id=<id>")
    with answering():
        return replay_run(replay.run_id, Path.cwd())


def refuse_differences(replay_report: dict[str, Any]) -> None:
    """Say that both runs are the same, bit for bit.

    Raises:
        UserError: They are not; names the first metric and step that differs, and has the table of all.
    """
    run_id, differences = replay_report["run_id"], replay_report["differences"]
    compared = f"{len(differences)} of {replay_report['compared']} numbers and digests"
    if not differences:
        logger.info("run %s is repeated bit for bit: %s differ", run_id, compared)
        return
    numbers = [row for row in differences if row["step"] is not None]
    first = f", the first number is {_shown(numbers[0])}" if numbers else ""
    more = [f"and {len(differences) - MAX_SHOWN} more"] if len(differences) > MAX_SHOWN else []
    lines = [f"run {run_id} is not repeated: {compared} differ{first}", *map(_shown, differences[:MAX_SHOWN]), *more]
    raise UserError("\n  ".join(lines))


def _shown(row: dict[str, Any]) -> str:
    step = "" if row["step"] is None else f" at step {row['step']}"
    return f"{row['metric']}{step}: recorded {row['recorded']!r}, now {row['replayed']!r}"

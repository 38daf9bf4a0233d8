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
    from qvl_pipeline.tracking.replay import replay_run

    if not replay.run_id:
        raise UserError("which run? Name it by its id in MLflow: kedro run --pipelines replay --params run_id=<id>")
    return replay_run(replay.run_id, Path.cwd())


def refuse_differences(replay_report: dict[str, Any]) -> None:
    """Say that both runs are the same, bit for bit.

    Raises:
        UserError: They are not; has the table of differences.
    """
    differences = replay_report["differences"]
    compared = f"{len(differences)} of {replay_report['compared']} numbers"
    if differences:
        lines = [
            f"  {row['metric']}{'' if row['step'] is None else ' at step ' + str(row['step'])}: "
            f"recorded {row['recorded']!r}, now {row['replayed']!r}"
            for row in differences[:MAX_SHOWN]
        ]
        more = [f"  and {len(differences) - MAX_SHOWN} more"] if len(differences) > MAX_SHOWN else []
        raise UserError("\n".join([f"run {replay_report['run_id']} is not repeated: {compared} differ", *lines, *more]))
    logger.info("run %s is repeated bit for bit: %s differ", replay_report["run_id"], compared)

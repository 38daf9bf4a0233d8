"""Runs that belong together: the stages of one `dvc repro` below one run, an evaluation below its training."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from qvl_pipeline.storage.whole import write_whole
from qvl_pipeline.tracking.lineage.code import DVC_VARIABLES
from qvl_pipeline.tracking.mlflow.known import FOLDER

if TYPE_CHECKING:
    from mlflow.entities import Run

# MLflow shows a run below the one that this tag names.
PARENT = "mlflow.parentRunId"
# Tag of a run that evaluates a training which another run made: the id of that.
EVALUATES = "evaluates_run"
# Tag of a run that is no stage: what the runs below it are.
CHAIN = "chain"
# Of the environment: the run that those of this process go below, such as that of a sweep.
ABOVE = "QVL_PARENT_RUN"
_FILE = "chain-{}.json"
_LONGEST_NAME = 120


def dvc_process() -> str | None:
    """Name the `dvc repro` or `dvc exp run` that this process is a stage of; `None` when it is none."""
    stage = DVC_VARIABLES["dvc_stage"]
    if not os.environ.get(stage):
        return None
    with contextlib.suppress(psutil.Error):  # a process of somebody else
        for process in psutil.Process().parents():
            if stage not in process.environ():
                return f"{process.pid}-{process.create_time():.0f}"
    return None


def chain_run(run_id: str, chain: str, name: str, tags: dict[str, str], folder: Path = FOLDER) -> tuple[str, bool]:
    """Return the run that stands above all runs of a chain; the first of them makes it.

    Args:
        run_id: A run of the chain.
        chain: Name of the chain, as `dvc_process` gives it, and of what is apart in it.
        name: Name of the run above.
        tags: Its tags.
        folder: Where it is noted.

    Returns:
        Its id, and whether it is new.

    Raises:
        MlflowException: The server does not take it.
    """
    from mlflow import MlflowClient

    noted = folder / _FILE.format(chain)
    if noted.exists():
        return json.loads(noted.read_text(encoding="utf-8"))["run_id"], False
    for left_behind in folder.glob(_FILE.format("*")):
        if not psutil.pid_exists(int(left_behind.name.split("-")[1])):
            left_behind.unlink(missing_ok=True)
    client = MlflowClient()
    info = client.get_run(run_id).info
    # It began before the first of its stages.
    above = client.create_run(info.experiment_id, start_time=info.start_time - 1, tags=tags, run_name=name)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(noted, json.dumps({"run_id": above.info.run_id}))
    return above.info.run_id, True


def chain_above(run: Run) -> str | None:
    """Return the run of the chain that a run is a stage of."""
    from mlflow import MlflowClient

    above = run.data.tags.get(PARENT)
    return above if above and CHAIN in MlflowClient().get_run(above).data.tags else None


def run_name(base: str, stages: list[str], experiment: str | None, changed: dict[str, object]) -> str:
    """Name a run so that one can tell it from others: `qwen3_vl_8b/train fast`, `qwen3_vl_8b learning_rate=0.5`.

    Args:
        base: Name of the profile, or what stands for it.
        stages: Its stages; none when it has all of them.
        experiment: DVC's name of the experiment, if there is one.
        changed: Without an experiment: values given on the command line by their dotted keys, without secrets.
    """
    name = "/".join([base, "+".join(stages)]) if stages else base
    given = [experiment] if experiment else [f"{key.rpartition('.')[2]}={value}" for key, value in changed.items()]
    whole = " ".join([name, *given])
    return whole if len(whole) <= _LONGEST_NAME else f"{whole[: _LONGEST_NAME - 1]}…"

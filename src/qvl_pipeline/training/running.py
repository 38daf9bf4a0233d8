"""A training from its spec to its result: launched, followed, or joined as a further node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from qvl_pipeline.tracking.mlflow.sinks import make_sinks
from qvl_pipeline.training.launcher import Processes, launch
from qvl_pipeline.training.progress import training_progress
from qvl_pipeline.training.scratch import METRICS, RESULT, SPEC, is_finished, starts_afresh

# Columns of the metrics that hold more than one number; trackers get them number by number.
_NESTED = ("loss_by_source", "learning_rates", "eval_loss_by_source")


def run_engine(folder: Path, processes: Processes, steps: int, trackers: list[str]) -> None:
    """Launch the engine on the spec in `folder`, and pass its metrics on to a progress bar and to trackers.

    When it was trained to the end before, but cut off before it was published, only the trackers get something.

    Args:
        folder: The training's scratch folder, with its spec and plans.
        processes: What to start on this node.
        steps: Steps of the whole run, for the bar.
        trackers: `report_to`.

    Raises:
        RankFailedError: A training process failed.
        StoppedOnRequest: A signal asked to stop.
    """
    from qvl_pipeline.tracking.mlflow.run import log_json_file

    spec, metrics = folder / SPEC, folder / METRICS
    log_json_file(spec)
    sinks = make_sinks(trackers, metrics, run_name=folder.parents[1].name)
    if is_finished(folder):
        for sink in sinks:
            sink.close()
        return
    where = f" on each of {processes.nodes.nnodes} nodes" if processes.nodes.nnodes > 1 else ""
    log, here = folder / "engine.log", Path.cwd()
    log = log.relative_to(here) if log.is_relative_to(here) else log
    print(f"train: {steps} steps on {processes.per_node} processes{where}; log: {log}", flush=True)
    with training_progress(metrics, steps) as update:

        def poll() -> None:
            update()
            for sink in sinks:
                sink.poll()

        try:
            launch(spec, processes, poll)
        finally:
            for sink in sinks:
                sink.close()


def join(folder: Path, processes: Processes, *, resume: bool) -> NoReturn:
    """Run this node's processes of a job whose results are node 0's to write, then leave with status 0.

    All nodes see the same folder. Node 0 makes it ready, and does so before its torchrun lets the job start. Until then
    it may hold a training that ended before: node 0 starts afresh there, unless it has but to publish it.
    """
    if starts_afresh(folder, resume=resume) or not is_finished(folder):
        nodes = processes.nodes
        print(f"train: node {nodes.node_rank} of {nodes.nnodes} joins node 0 at {nodes.endpoint}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        launch(folder / SPEC, processes, lambda: None)
    raise SystemExit(0)


def collect(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read what a finished training left: its logged steps, and its result with what only all of them tell.

    Returns:
        One row a logged step, with `learning_rate/<part>` where parts differ, and `result.json` with `final_loss`,
        `train_time_s` and `tokens_per_second`.
    """
    rows = pd.read_json(folder / METRICS, lines=True)
    rates = _rates_by_part(rows)
    rows = rows.drop(columns=[name for name in _NESTED if name in rows]).join(rates)
    # From the rows, which are those of all legs of a training that was cut off and resumed.
    train_time_s = float((rows["tokens"] / rows["tokens_per_second"]).sum())
    losses = rows["loss"].dropna()  # of samples that are skipped there is none
    facts = {
        "final_loss": float(losses.iloc[-1]) if len(losses) else None,
        "train_time_s": train_time_s,
        "tokens_per_second": float(rows["tokens"].sum()) / train_time_s,
    }
    return rows, json.loads((folder / RESULT).read_text(encoding="utf-8")) | facts


def _rates_by_part(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the learning rates of parts of the model as columns; none where all parts have the same."""
    by_part = pd.DataFrame(rows["learning_rates"].tolist() if "learning_rates" in rows else [], index=rows.index)
    return by_part.add_prefix("learning_rate/") if (by_part.nunique(axis=1) > 1).any() else by_part[[]]

"""A training that ended, but was cut off before it was published: the run that publishes it gets the curve."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from qvl_pipeline.tracking.mlflow.run import start_run
from qvl_pipeline.training.launcher import Processes
from qvl_pipeline.training.running import run_engine
from qvl_pipeline.training.scratch import EXPORT, METRICS, RESULT, SPEC


def test_the_run_that_publishes_a_finished_training_gets_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_database: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "profile" / "scratch" / "0123"
    folder.mkdir(parents=True)
    rows = [{"step": step, "max_steps": 2, "loss": 3.0 - step, "time": 1e9 + step} for step in (1, 2)]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{METRICS}.mlflow").write_text(json.dumps({"run_id": "the one that was killed", "step": 2}))
    (folder / RESULT).write_text("{}")
    (folder / SPEC).write_text("{}")
    (folder / EXPORT).mkdir()
    run = start_run(tracking_database, "qvl_pipeline", str(tmp_path), "publishes")
    try:
        run_engine(folder, Processes(per_node=1), 2, ["mlflow"])
        history = mlflow.MlflowClient(tracking_database).get_metric_history(run.id, "train/loss")
    finally:
        run.finish("FINISHED")
        mlflow.set_tracking_uri(None)
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]

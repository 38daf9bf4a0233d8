"""Kinds and sources are named by people, and MLflow refuses some characters: no two of them may become one metric."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from qvl_pipeline.tracking.mlflow.run import MlflowRun, valid_name
from qvl_pipeline.tracking.mlflow.sinks import make_sinks

# Pairs that MLflow could not tell apart, or refuses, and with it all metrics that are sent together.
NAMES = ["a+b", "a,b", "a_b", "图 1", "ä", "", ".", "..", "a//b", "a/./b", "/a", "a/", "x" * 300 + "1", "x" * 300 + "2"]


@pytest.fixture
def run_id(tracking_database: str) -> str:
    mlflow.set_tracking_uri(tracking_database)
    with mlflow.start_run() as run:
        return run.info.run_id


def test_every_kind_has_metrics_of_its_own(run_id: str) -> None:
    MlflowRun(run_id).log_metrics({"trained": {kind: {"n": n} for n, kind in enumerate(NAMES)}})
    metrics = mlflow.get_run(run_id).data.metrics
    assert sorted(metrics.values()) == list(range(len(NAMES)))
    # What compare.py takes apart again.
    assert all(name.startswith("trained/") and name.endswith("/n") for name in metrics if len(name) < 250)


def test_every_source_has_a_curve_of_its_own(run_id: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss_by_source": {name: n for n, name in enumerate(NAMES)}} for step in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with mlflow.start_run(run_id):
        (sink,) = make_sinks(["mlflow"], path, "name")
        sink.close()
    curves = mlflow.get_run(run_id).data.metrics
    assert sorted(curves.values()) == list(range(len(NAMES)))
    assert all(len(mlflow.MlflowClient().get_metric_history(run_id, name)) == 2 for name in curves)


def test_a_name_that_mlflow_takes_stays_as_it_is() -> None:
    assert valid_name("trained/two images/exact_match") == "trained/two images/exact_match"
    assert valid_name("train/loss_by_source/图-1.5") == "train/loss_by_source/图-1.5"

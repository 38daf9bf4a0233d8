"""What DVC does with a trained project: experiments, and comparing them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.dvc_repository import command, commit, make_repository

RESULT = "data/08_reporting/base/train_result.json"
PARAMETERS = "conf/base/parameters_train.yml"
RATES = {"slow": 0.0005, "fast": 0.004}


@pytest.fixture(scope="module")
def environment(tracking_database: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking_database)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Path:
    """A repository as its owner would leave it: all stages run, `dvc.lock` committed."""
    folder = make_repository(tmp_path_factory.mktemp("dvc") / "project")
    command(folder, "kedro run")
    command(folder, "dvc commit --force")
    commit(folder)
    return folder


def test_the_lock_has_what_a_run_by_kedro_made(trained: Path) -> None:
    assert command(trained, "dvc status") == "Data and pipelines are up to date.\n"


@pytest.fixture(scope="module")
def experiments(trained: Path) -> Path:
    """Two experiments with other learning rates: one in the project, one from the queue in a folder of its own."""
    change = f"-S {PARAMETERS}:train.learning_rate"
    command(trained, f"dvc exp run --queue --name fast {change}={RATES['fast']} train@base")
    command(trained, "dvc queue start")
    command(trained, f"dvc exp run --name slow {change}={RATES['slow']} train@base")
    deadline = time.monotonic() + 120
    while "Success" not in (status := command(trained, "dvc queue status")):
        assert "Failed" not in status, command(trained, "dvc queue logs fast")
        assert time.monotonic() < deadline, status
        time.sleep(1)
    return trained


def shown(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what `dvc exp show` has of every experiment: its parameters and metrics by file."""
    (head,) = (entry for entry in json.loads(command(folder, "dvc exp show --json")) if entry["experiments"])
    return {experiment["name"]: experiment["revs"][0]["data"] for experiment in head["experiments"]}


def mlflow_run(experiment: str, database: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(database)
    found = client.get_experiment_by_name("qvl_pipeline")
    (run,) = client.search_runs([found.experiment_id], f"tags.dvc_experiment = '{experiment}'")
    return run


def test_experiments_are_in_mlflow_and_agree_with_dvc(experiments: Path, tracking_database: str) -> None:
    table = shown(experiments)
    assert sorted(table) == ["fast", "slow"]
    losses = {}
    for name, rate in RATES.items():
        run = mlflow_run(name, tracking_database)
        parameters, result = table[name]["params"][PARAMETERS]["data"], table[name]["metrics"][RESULT]["data"]
        assert parameters["train"]["learning_rate"] == rate
        assert json.loads(run.data.params["train.learning_rate"]) == rate
        assert run.info.status == "FINISHED"
        assert run.data.tags["dvc_stage"] == "train@base"
        assert result["mlflow_run_id"] == run.info.run_id
        assert result["final_loss"] == run.data.metrics["train/loss"]
        losses[name] = result["final_loss"]
    assert losses["slow"] != losses["fast"]


def test_metrics_are_compared(experiments: Path) -> None:
    table = shown(experiments)
    before, after = (table[name]["metrics"][RESULT]["data"]["final_loss"] for name in ("slow", "fast"))
    changed = json.loads(command(experiments, "dvc metrics diff slow fast --json"))[RESULT]["final_loss"]
    assert (changed["old"], changed["new"]) == (before, after)
    assert changed["diff"] == pytest.approx(after - before)


def test_loss_curves_are_drawn_together(experiments: Path) -> None:
    command(experiments, "dvc plots diff slow fast --out curves")
    page = (experiments / "curves" / "index.html").read_text()
    assert "Training loss" in page
    for name in RATES:
        last = shown(experiments)[name]["metrics"][RESULT]["data"]["final_loss"]
        assert f'"rev": "{name}"' in page
        assert str(last) in page

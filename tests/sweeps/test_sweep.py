"""Sweeps of the trained repository: what they find, what stays of them, and that they go on after they were killed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from tests.dvc_repository import command

PROFILE = "tiny_qwen3_vl"
RATE = "train.learning_rate"


def sweep_file(project: Path, name: str, **values: Any) -> str:
    (project / f"{name}.yml").write_text(yaml.safe_dump({"env": PROFILE, **values}))
    return f"kedro sweep {name}.yml"


def trials(project: Path, name: str) -> list[dict[str, Any]]:
    paths = (project / "data/sweeps" / name).glob("*.json")
    return [json.loads(path.read_text()) for path in sorted(paths) if path.name != "above.json"]


def models(project: Path, name: str) -> list[str]:
    return sorted(path.parent.name for path in (project / "data/06_models").glob(f"{PROFILE}-{name}-*/trained"))


def test_optuna_finds_a_better_rate_than_the_default_in_a_few_trials(trained: Path, tracking_database: str) -> None:
    result = json.loads((trained / f"data/08_reporting/{PROFILE}/train_result.json").read_text())
    line = sweep_file(
        trained,
        "rates",
        method="optuna",
        trials=5,
        objective={"minimize": "train/loss"},
        parameters={RATE: {"low": 1.0e-4, "high": 0.1, "log": True}},
    )
    printed = command(trained, line)
    found = sorted(trials(trained, "rates"), key=lambda trial: trial["objective"])
    assert [trial["state"] for trial in found] == ["done"] * 5
    assert found[0]["objective"] < result["final_loss"], "that of the default"
    assert f"best of 5: learning_rate={found[0]['values'][RATE]}" in printed
    assert len(models(trained, "rates")) == 1, "only the best model stays"
    page = (trained / f"data/08_reporting/{PROFILE}/sweep-rates.html").read_text()
    assert page.index(str(found[0]["values"][RATE])) < page.index(str(found[-1]["values"][RATE]))

    client = mlflow.MlflowClient(tracking_database)
    above = client.get_run(json.loads((trained / "data/sweeps/rates/above.json").read_text())["run_id"])
    assert (above.info.run_name, above.info.status) == (f"{PROFILE} rates", "FINISHED")
    assert above.data.metrics["best/train/loss"] == found[0]["objective"]
    condition = f"tags.`mlflow.parentRunId` = '{above.info.run_id}' and attributes.status = 'FINISHED'"
    below = client.search_runs([above.info.experiment_id], condition)
    assert {json.loads(run.data.params[RATE]) for run in below} == {trial["values"][RATE] for trial in found}
    assert all(run.info.run_name.startswith(f"{PROFILE} learning_rate=") for run in below)
    # The project's own results are as they were.
    assert command(trained, "dvc status") == "Data and pipelines are up to date.\n"


def test_losses_that_no_trial_would_have_are_asked_for_before_one_is_trained(trained: Path) -> None:
    line = sweep_file(trained, "blind", objective={"minimize": "train/eval_loss"}, parameters={"train.seed": [1]})
    result = subprocess.run(line.split(), cwd=trained, capture_output=True, text=True, check=False)
    assert (result.returncode, trials(trained, "blind")) == (1, [])
    assert "evaluations while training: set train.eval_strategy to steps" in " ".join(result.stderr.split())


def test_a_grid_that_is_killed_goes_on_where_it_was(trained: Path) -> None:
    line = sweep_file(
        trained, "seeds", objective={"minimize": "trained/overall/loss"}, parameters={"train.seed": [1, 2]}, keep="all"
    )
    process = subprocess.Popen(line.split(), cwd=trained, start_new_session=True)
    try:
        deadline = time.monotonic() + 250
        while not [trial for trial in trials(trained, "seeds") if trial["state"] == "done"]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (before,) = [trial for trial in trials(trained, "seeds") if trial["state"] == "done"]
    printed = command(trained, line)
    after = trials(trained, "seeds")
    assert [trial["state"] for trial in after] == ["done", "done"]
    assert before in after
    assert f"seed={before['values']['train.seed']}" not in printed.partition("best of 2")[0], "it is not tried again"
    assert len(models(trained, "seeds")) == 2


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"ingest.eval_fraction": [0.1]}, "ingest.… makes the dataset, which trials share"),
        ({"trian.seed": [1]}, "no stage reads trian.seed"),
    ],
)
def test_what_cannot_be_varied_is_said(trained: Path, parameters: dict[str, Any], sentence: str) -> None:
    line = sweep_file(trained, "wrong", objective={"minimize": "train/loss"}, parameters=parameters)
    done = subprocess.run(line.split(), cwd=trained, capture_output=True, text=True)
    assert done.returncode == 1
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr

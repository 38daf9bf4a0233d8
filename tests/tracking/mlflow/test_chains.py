"""Rows of MLflow that belong together, and what each of them has to be understood alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import mlflow
import pytest

from qvl_pipeline.tracking.mlflow.chain import ABOVE, run_name
from tests.kedro_project import FAILS, run
from tests.tracking.mlflow.test_mlflow_hook import recorded


def test_a_stage_has_the_parameters_of_all_that_it_was_made_from(project: Path) -> None:
    run(project, "ingest", "tokenize")
    run(project, "train")
    assert {key.split(".")[0] for key in recorded()[-1].data.params} == {"ingest", "train"}
    run(project, "evaluate")
    assert {key.split(".")[0] for key in recorded()[-1].data.params} == {"ingest", "train", "model", "evaluate"}


def test_a_training_gets_the_parameters_of_the_evaluation_whose_scores_it_gets(project: Path) -> None:
    run(project, "ingest", "tokenize", "train")
    training = recorded()[-1].info.run_id
    client = mlflow.MlflowClient()
    run(project, "evaluate", params={"evaluate": {"max_new_tokens": 5}})
    data = client.get_run(training).data
    assert data.params["evaluate.max_new_tokens"] == "5"
    assert data.metrics["trained/video/exact_match"] == 0.9
    assert "evaluated_otherwise" not in data.tags
    run(project, "evaluate", params={"evaluate": {"max_new_tokens": 7}})
    data = client.get_run(training).data
    assert data.params["evaluate.max_new_tokens"] == "5", "MLflow changes no parameter"
    assert data.tags["evaluated_otherwise"] == "evaluate.max_new_tokens=7"
    run(project, "evaluate", params={"evaluate": {"max_new_tokens": 5}})
    assert client.get_run(training).data.tags["evaluated_otherwise"] == ""


def test_the_stages_of_one_dvc_process_are_below_one_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train@tiny_qwen3_vl")
    monkeypatch.setenv("DVC_EXP_NAME", "wider")
    before = len(recorded())
    run(project, "ingest", "tokenize", "train")
    with pytest.raises(ZeroDivisionError):
        run(project, "train", params={"train": {"seed": FAILS}})
    assert recorded()[before].info.status == "FAILED"
    run(project, "evaluate")
    above, *stages = recorded()[before:]
    assert (above.info.run_name, above.info.status) == ("tiny_qwen3_vl wider", "FINISHED")
    assert [stage.data.tags["mlflow.parentRunId"] for stage in stages] == 3 * [above.info.run_id]
    assert stages[-1].data.tags["evaluates_run"] == stages[0].info.run_id
    assert above.data.metrics["trained/video/exact_match"] == 0.9, "scores and parameters stand in one row"
    assert {"sample.fps", "train.seed", "evaluate.batch_size"} <= above.data.params.keys()
    run(project, "ingest", env="tiny_qwen2_5_vl")
    assert recorded()[-1].data.tags["mlflow.parentRunId"] != above.info.run_id, "another profile is another experiment"


def test_runs_of_a_sweep_are_below_its_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(project, "ingest")
    above = recorded()[-1].info.run_id
    monkeypatch.setenv(ABOVE, above)
    run(project, "ingest")
    assert recorded()[-1].data.tags["mlflow.parentRunId"] == above


def test_names_tell_runs_apart() -> None:
    assert run_name("tiny", [], None, {}) == "tiny"
    assert run_name("tiny", ["train", "evaluate"], "fast", {"train.seed": 3}) == "tiny/train+evaluate fast"
    assert run_name("tiny", [], None, {"train.seed": 3, "model.tiny_seed": 4}) == "tiny seed=3 tiny_seed=4"
    assert len(run_name("tiny", [], None, {"ingest.datasets": "x" * 500})) == 120


def test_other_parameters_are_no_other_code(project: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "--quiet"], ["add", "conf", "pyproject.toml"], ["commit", "--quiet", "--message", "a"]):
        subprocess.run([*git, *arguments], check=True)
    with (project / "conf/tiny_qwen3_vl/parameters.yml").open("a") as file:
        file.write("# another value\n")
    run(project, "ingest")
    assert recorded()[-1].data.tags["git_dirty"] == "false"
    with (project / "conf/base/catalog.yml").open("a") as file:
        file.write("# another entry\n")
    run(project, "ingest")
    assert recorded()[-1].data.tags["git_dirty"] == "true"

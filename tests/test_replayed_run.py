"""A recorded training is repeated: with its data from a DVC remote, and with data that is made again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from tests.dvc_repository import command
from tests.kedro_project import REPOSITORY

# What a run of `train` and `evaluate` reads.
INPUTS = {
    "base_model",
    "pack_plan",
    "plan_summary",
    "sampled_samples",
    "stream_samples",
    "tokenized_samples",
    "validation_report",
    "video_frames",
}
STAGES_BEFORE = "data/0[2-8]_*"
GIVEN = "given_parameters.yml"


@pytest.fixture(scope="module")
def client(trained: Path, tracking_database: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_database)


@pytest.fixture(scope="module")
def run_id(trained: Path) -> str:
    return json.loads((trained / "data/08_reporting/tiny_qwen3_vl/train_result.json").read_text())["mlflow_run_id"]


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A project without data and DVC cache, with an engine that does not work: all it had is in a remote and Git."""
    folder = shutil.copytree(trained, tmp_path / "project", symlinks=True)
    for layer in folder.glob(STAGES_BEFORE):
        shutil.rmtree(layer)
    # A remote that is a folder is laid out as the cache is.
    shutil.move(folder / ".dvc/cache", tmp_path / "storage")
    package, engine = (Path("src/qvl_pipeline"), Path("src/qvl_pipeline/engine"))
    (folder / package).unlink()
    for whole in (package, engine):
        (folder / whole).mkdir()
        for file in (REPOSITORY / whole).iterdir():
            if file.name not in ("engine", "__main__.py"):
                (folder / whole / file.name).symlink_to(file)
    (folder / engine / "__main__.py").write_text("raise SystemExit('not the code of the commit')")
    return folder


def replay(project: Path, run_id: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    line = ["kedro", "run", "--pipelines", "replay", "--params", f"run_id={run_id}"]
    done = subprocess.run(line, cwd=project, capture_output=True, text=True)
    report = project / "data/08_reporting/replay_report.json"
    assert report.exists(), done.stderr
    return done, json.loads(report.read_text())


def test_a_training_is_repeated_bit_for_bit_with_the_code_and_the_data_of_then(
    project: Path, run_id: str, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    command(project, f"dvc remote add --default storage {tmp_path / 'storage'}")
    client.create_registered_model("replayed")
    client.create_model_version("replayed", "runs:/somebody/model")
    client.set_registered_model_alias("replayed", "champion", "1")
    (project / "conf/local/mlflow.yml").write_text("register_model: replayed\nalias: champion\n")
    done, report = replay(project, run_id)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(client.get_model_version_by_alias("replayed", "champion").version) == 1, "it changes nothing of others"
    assert len(client.search_model_versions("name = 'replayed'")) == 1
    assert f"run {run_id} is repeated bit for bit" in " ".join(done.stderr.split())
    assert report["inputs"] == dict.fromkeys(INPUTS, "from DVC")
    assert report["differences"] == []
    (again,) = report["replayed_as"]
    before, after = client.get_run(run_id).data, client.get_run(again).data
    assert after.tags["replay_of"] == run_id
    assert [after.metrics[name] for name in ("train/loss", "trained/overall/loss")] == [
        before.metrics[name] for name in ("train/loss", "trained/overall/loss")
    ]
    curves = [
        [(point.step, point.value) for point in client.get_metric_history(run, "train/loss")] for run in (run_id, again)
    ]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [1, 2]
    assert report["compared"] > 50, "numbers by step, scores and digests"
    assert not any((project / "data/replay").iterdir()), "the worktree is removed"


@pytest.fixture
def another_seed(run_id: str, client: mlflow.MlflowClient) -> Iterator[None]:
    """The record says another order of samples than the run had, and nothing of an evaluation, which takes its time."""
    recorded = mlflow.artifacts.load_text(f"{client.get_run(run_id).info.artifact_uri}/{GIVEN}")
    changed = yaml.safe_load(recorded)
    changed["batching"]["seed"] = 7
    client.log_text(run_id, yaml.safe_dump(changed), GIVEN)
    client.set_tag(run_id, "pipelines", "train")
    yield
    client.log_text(run_id, recorded, GIVEN)
    client.set_tag(run_id, "pipelines", "train+evaluate")


def test_another_seed_is_told_by_the_first_number_that_differs_and_data_that_is_nowhere_is_made_again(
    project: Path, run_id: str, another_seed: None
) -> None:
    shutil.rmtree(project / "data/01_raw")
    done, report = replay(project, run_id)
    assert done.returncode != 0
    assert report["inputs"] == dict.fromkeys(INPUTS, "made again")
    errors = " ".join(done.stderr.split())
    assert f"run {run_id} is not repeated: {len(report['differences'])} of {report['compared']} numbers" in errors
    first = next(row for row in report["differences"] if row["step"] is not None)
    assert (first["metric"].split("/")[0], first["step"]) == ("train", 1)
    assert f"the first number is {first['metric']} at step 1: recorded {first['recorded']!r}, now" in errors
    differ = {row["metric"] for row in report["differences"]}
    assert differ & INPUTS == {"pack_plan", "plan_summary"}, "all else came out the same, bit for bit"
    assert {"plan_fingerprint", "train/loss", "weights"} <= differ
    assert not any(name.startswith(("untrained/", "trained/")) for name in differ), "scores that were not asked for"
    assert "data_fingerprint" not in differ

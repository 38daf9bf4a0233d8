from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import mlflow
import pytest
import yaml

from qvl_pipeline.config import ReplayConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.pipelines.replay.nodes import refuse_differences, repeat
from qvl_pipeline.tracking.lineage.uncommitted import uncommitted
from qvl_pipeline.tracking.replay import repeat as replay
from qvl_pipeline.tracking.replay.comparison import compare_numbers, compare_weights, is_same
from qvl_pipeline.tracking.replay.repeatable import read_run
from tests.dvc_repository import command, commit


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A git repository with one module and one catalog."""
    folder = tmp_path / "code"
    (folder / "src").mkdir(parents=True)
    (folder / "conf" / "base").mkdir(parents=True)
    (folder / "src" / "old.py").write_text("one = 1\n")
    (folder / "conf" / "base" / "catalog.yml").write_text("a: {}\n")
    (folder / "conf" / "base" / "credentials.yml").write_text("token: none\n")
    command(tmp_path, f"git init --quiet {folder}")
    commit(folder)
    return folder


def test_code_of_no_commit_is_recorded_and_applies_to_the_commit(code: Path, tmp_path: Path) -> None:
    (code / "src" / "old.py").write_text("one = 2\n")
    (code / "src" / "new.py").write_text("two = 2\n")
    (code / "conf" / "base" / "catalog.yml").write_text("b: {}\n")
    (code / "conf" / "base" / "credentials.yml").write_text("token: secret\n")
    before = command(code, "git status --short")
    patch = tmp_path / "patch"
    text, masked = uncommitted(code)
    patch.write_text(text)
    assert not masked
    assert command(code, "git status --short") == before
    assert "secret" not in patch.read_text()
    command(tmp_path, f"git clone --quiet {code} {tmp_path / 'copy'}")
    command(tmp_path / "copy", f"git apply {patch}")
    for name in ("src/old.py", "src/new.py", "conf/base/catalog.yml"):
        assert (tmp_path / "copy" / name).read_text() == (code / name).read_text()


@pytest.fixture
def client(tracking_database: str) -> mlflow.MlflowClient:
    mlflow.set_tracking_uri(tracking_database)
    return mlflow.MlflowClient()


def recorded(client: mlflow.MlflowClient, losses: list[float], tags: dict[str, str] | None = None) -> str:
    run_id = client.create_run("0", tags=tags).info.run_id
    for step, loss in enumerate(losses):
        client.log_metric(run_id, "train/loss", loss, step=step)
        client.log_metric(run_id, "train/tokens_per_second", id(losses) + step, step=step)
    client.set_terminated(run_id)
    return run_id


def test_the_same_numbers_are_no_difference_whatever_the_speed(client: mlflow.MlflowClient) -> None:
    nan = float("nan")
    rows = compare_numbers(recorded(client, [0.1, 0.2, nan]), recorded(client, [0.1, 0.2, nan]), scores=True)
    assert [row["step"] for row in rows if is_same(row)] == [0, 1, 2]


def test_one_bit_and_a_missing_step_are_differences_and_the_first_is_named(client: mlflow.MlflowClient) -> None:
    first, second = recorded(client, [0.1, 0.3, 0.5]), recorded(client, [0.1, 0.1 + 0.2])
    # Scores come after the curves, though they are at step 0.
    client.log_metric(first, "base/overall/loss", 1.0, step=0)
    rows = compare_numbers(first, second, scores=True)
    differences = [row for row in rows if not is_same(row)]
    assert len(rows) == 4
    assert differences == [
        {"metric": "train/loss", "step": 1, "recorded": 0.3, "replayed": 0.30000000000000004},
        {"metric": "train/loss", "step": 2, "recorded": 0.5, "replayed": None},
        {"metric": "base/overall/loss", "step": 0, "recorded": 1.0, "replayed": None},
    ]
    data = {"metric": "pack_plan", "step": None, "recorded": "md5:a", "replayed": "md5:b"}
    report = {"run_id": "r", "compared": 5, "differences": [data, *differences]}
    expected = (
        r"run r is not repeated: 4 of 5 numbers and digests differ, the first number is train/loss at step 1: "
        r"recorded 0\.3, now 0\.30000000000000004\n  pack_plan: recorded 'md5:a', now 'md5:b'\n  train/loss at step 1"
    )
    with pytest.raises(UserError, match=expected):
        refuse_differences(report)
    report["differences"] = 30 * [data]
    with pytest.raises(UserError, match=r"30 of 5 numbers and digests differ\n  pack_plan(.|\n)*\n  and 10 more$"):
        refuse_differences(report)


def test_scores_of_an_evaluation_that_is_not_repeated_are_not_missed(client: mlflow.MlflowClient) -> None:
    first, second = recorded(client, [0.1]), recorded(client, [0.1])
    client.log_metric(first, "base/overall/loss", 1.0, step=0)
    assert [row["metric"] for row in compare_numbers(first, second, scores=False)] == ["train/loss"]


def test_weights_are_compared_by_their_digest(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    experiment = client.create_experiment("weights", tmp_path.as_uri())
    first, second, none = (client.create_run(experiment).info.run_id for _ in range(3))
    for run_id, digest in ((first, "md5:a"), (second, "md5:b")):
        client.log_text(run_id, json.dumps({"digest": digest}), "model/pointer.json")
    (row,) = compare_weights(first, second)
    assert row == {"metric": "weights", "step": None, "recorded": "md5:a", "replayed": "md5:b"}
    assert not is_same(compare_weights(first, none)[0])
    assert compare_weights(none, first) == []


def test_what_cannot_be_repeated_is_said(client: mlflow.MlflowClient) -> None:
    with pytest.raises(UserError, match="has no run 'nope'"):
        read_run("nope")
    with pytest.raises(UserError, match="which run"):
        repeat(ReplayConfig())
    with pytest.raises(UserError, match=r"recorded without mlflow\.source\.git\.commit, pipelines, profile"):
        read_run(recorded(client, []))
    with pytest.raises(UserError, match="evaluates the training abc: replay that"):
        read_run(recorded(client, [], {"evaluates_run": "abc"}))
    tags = {"mlflow.source.git.commit": "c", "pipelines": "train", "profile": "tiny_qwen3_vl", "dataset": "digits"}
    with pytest.raises(UserError, match=r"its code held a secret that is masked in uncommitted\.patch"):
        read_run(recorded(client, [], tags | {"git_dirty": "true", "uncommitted_masked": "true"}))
    with pytest.raises(UserError, match=r"its artifact uncommitted\.patch is not there"):
        read_run(recorded(client, [], tags | {"git_dirty": "true"}))


def test_a_replay_is_recorded_where_ones_own_runs_are(tmp_path: Path) -> None:
    (tmp_path / "conf/local").mkdir(parents=True)
    (tmp_path / "work/conf" / replay.PROFILE).mkdir(parents=True)
    written = tmp_path / "work/conf" / replay.PROFILE / "mlflow.yml"
    own = {"run_name": "a replay", "register_model": None}
    replay._name_next_run(tmp_path, tmp_path / "work", "a replay")
    assert yaml.safe_load(written.read_text()) == own
    (tmp_path / "conf/local/mlflow.yml").write_text("experiment: mine\nrun_name: mine\nregister_model: digits\n")
    replay._name_next_run(tmp_path, tmp_path / "work", "a replay")
    assert yaml.safe_load(written.read_text()) == {"experiment": "mine", **own}


def test_a_run_that_is_repeated_ends_in_its_own_way_when_the_replay_is_interrupted(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # The child asks for the interrupt once it is ready for the signal and waited for, and takes a while to end.
    child = "trap 'sleep 0.5; touch ended; exit' TERM; sleep 1; kill -USR1 $PPID; while :; do sleep 0.1; done"
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            replay._run(["bash", "-c", child], tmp_path, dict(os.environ))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "ended").exists()

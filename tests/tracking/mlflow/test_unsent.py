from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from kedro.framework.project import pipelines

from qvl_pipeline.errors import UserError
from qvl_pipeline.storage.digests import read_sealed
from qvl_pipeline.tracking.mlflow import sinks
from qvl_pipeline.tracking.mlflow.sinks import MetricsSink, SendToMlflow
from qvl_pipeline.tracking.mlflow.unsent import keep_unsent, only_sender, send_unsent
from tests.kedro_project import run
from tests.tracking.server import FAULTS, LATE_S, FaultyProxy

# What an engine does, as far as trackers see it: it appends rows at its pace, and waits for nobody.
ENGINE = """
import itertools, json, sys, time
from pathlib import Path
folder, timed = Path(sys.argv[1]), sys.argv[2] == "True"
for step in itertools.count(1):
    time.sleep(0.02)
    row = {"step": step, "loss": 1 / step, "mfu": None, "loss_by_source": {"a": 2.0}}
    if step % 10 == 0:
        row["eval_loss"] = 2 / step
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | ({"time": 1.7e9 + step} if timed else {})) + "\\n")
    if (folder / "stop").exists():
        break
"""


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(sinks, "_FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(sinks, "_LAST_RETRY_S", 0.1)
    with FaultyProxy(server) as proxy:
        mlflow.set_tracking_uri(proxy.uri)
        yield proxy
    mlflow.set_tracking_uri(None)


@pytest.fixture
def run_id(proxy: FaultyProxy) -> str:
    return mlflow.MlflowClient().create_run("0").info.run_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data/06_models/tiny_qwen3_vl/scratch/abc"
    folder.mkdir(parents=True)
    return folder


def write(folder: Path, steps: range, mode: str = "a") -> None:
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps({"step": step, "loss": 1 / step, "time": 1.7e9 + step}) + "\n" for step in steps)


def stored(run_id: str, name: str) -> list[tuple[int, float]]:
    """Return every step and value of a metric that the server has, repetitions and all."""
    return sorted((point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run_id, name))


def sink_of(run_id: str, folder: Path, send: Any = None) -> MetricsSink:
    return MetricsSink("mlflow", run_id, folder / "metrics.jsonl", send or SendToMlflow(run_id))


@pytest.mark.parametrize(("timed", "faults"), [(False, FAULTS), (True, (*FAULTS, "late"))])
def test_a_failing_server_gets_every_step_exactly_once_and_is_never_waited_for(
    proxy: FaultyProxy, run_id: str, folder: Path, timed: bool, faults: tuple[str, ...]
) -> None:
    """Without times in the rows, a repetition would be stored twice: then only asking the server first helps."""
    senders, send = set(), SendToMlflow(run_id)

    def seen(rows: list[dict[str, Any]]) -> None:
        senders.add(threading.current_thread())
        send(rows)

    sink = sink_of(run_id, folder, seen)
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, folder, str(timed)])
    proxy.set_faults(*faults)
    deadline = time.monotonic() + 60
    while len(proxy.happened) <= len(faults) and time.monotonic() < deadline:
        proxy.failing = sink._last_step > 0
        sink.poll()
        time.sleep(0.02)
    proxy.failing = False
    (folder / "stop").touch()
    engine.wait()
    assert {*faults} <= {*proxy.happened}
    assert threading.main_thread() not in senders
    assert sink.close() == 0
    if "late" in faults:
        time.sleep(LATE_S)
    steps = 1 + len((folder / "metrics.jsonl").read_text().splitlines())
    assert stored(run_id, "train/loss") == [(step, 1 / step) for step in range(1, steps)]
    assert stored(run_id, "train/loss_by_source/a") == [(step, 2.0) for step in range(1, steps)]
    assert stored(run_id, "train/eval_loss") == [(step, 2 / step) for step in range(10, steps, 10)]


def test_rows_of_a_server_that_stays_down_are_sent_later_and_once(
    proxy: FaultyProxy, run_id: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = sink_of(run_id, folder)
    write(folder, range(1, 4))
    assert sink.close() == 0
    proxy.set_faults("dropped", "carried_out_and_dropped")
    proxy.failing = True
    write(folder, range(4, 9))
    sink = sink_of(run_id, folder)
    assert sink.close() == 5
    assert "did not get the last 5 rows" in caplog.text
    models = folder.parents[2]
    assert send_unsent(models) == {run_id: {"sent": 0, "left": 5}}
    proxy.failing = False
    assert send_unsent(models) == {run_id: {"sent": 5, "left": 0}}
    assert send_unsent(models) == {}
    assert stored(run_id, "train/loss") == [(step, 1 / step) for step in range(1, 9)]


def test_a_training_that_starts_again_takes_no_unsent_rows_with_it(
    proxy: FaultyProxy, run_id: str, folder: Path
) -> None:
    sink_of(run_id, folder)
    write(folder, range(1, 4))
    keep_unsent(folder)
    write(folder, range(1, 3), mode="w")
    other = mlflow.MlflowClient().create_run("0").info.run_id
    assert sink_of(other, folder).close() == 0
    assert send_unsent(folder.parents[2]) == {run_id: {"sent": 3, "left": 0}}
    assert (len(stored(run_id, "train/loss")), len(stored(other, "train/loss"))) == (3, 2)
    assert [path.name for path in folder.parent.glob("unsent/*")] == [], "all of it was sent"
    keep_unsent(folder)
    assert [path.name for path in folder.parent.glob("unsent/*")] == [], "nothing to keep"


def test_what_trains_is_left_alone(run_id: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink_of(run_id, folder)
    write(folder, range(1, 4))
    with only_sender(folder):
        assert send_unsent(folder.parents[2]) == {}
        assert f"{folder} is in use" in caplog.text
        with pytest.raises(UserError, match="another process trains there"), only_sender(folder):
            pass
    assert send_unsent(folder.parents[2])[run_id]["sent"] == 3


def test_a_file_system_without_locks_keeps_nobody_from_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    caplog.set_level("INFO")
    monkeypatch.setattr("fcntl.flock", unsupported)
    with only_sender(folder):
        assert "cannot be locked" in caplog.text
    with pytest.raises(BlockingIOError), only_sender(folder):
        raise BlockingIOError("of the training itself, and not of the lock")


def test_a_run_of_another_server_keeps_its_rows(proxy: FaultyProxy, folder: Path) -> None:
    sink_of("0" * 32, folder)
    write(folder, range(1, 4))
    assert send_unsent(folder.parents[2]) == {"0" * 32: {"sent": 0, "left": 3}}
    assert (folder / "metrics.jsonl").exists()


def test_kedro_sends_them_and_makes_no_run_of_its_own(project: Path, tracking_database: str) -> None:
    pipelines.configure("qvl_pipeline.pipeline_registry")
    mlflow.set_tracking_uri(tracking_database)
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    folder = project / "data/06_models/tiny/scratch/abc"
    folder.mkdir(parents=True)
    sink_of(run_id, folder)
    write(folder, range(1, 4))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    before = len(client.search_runs(experiments))
    run(project, "sync_metrics")
    assert stored(run_id, "train/loss") == [(step, 1 / step) for step in range(1, 4)]
    assert len(client.search_runs(experiments)) == before
    report = read_sealed(project / "data/08_reporting/tiny_qwen3_vl/sync_report.json")
    assert report == {run_id: {"sent": 3, "left": 0}}
    sink_of("0" * 32, folder)
    with pytest.raises(UserError, match="MLflow did not take all of 0000"):
        run(project, "sync_metrics")

"""Runs whose process was killed are marked so by the next one, and a database that lost its runs is noticed."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.mlflow import known
from qvl_pipeline.tracking.mlflow.run import start_run

BEGIN = """
import os, signal, sys
from pathlib import Path
from qvl_pipeline.tracking.mlflow.run import start_run
run = start_run(sys.argv[1], "qvl_pipeline", str(Path.cwd()), "first")
print(run.id, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.readline()
run.finish("FINISHED")
"""


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def begin(uri: str, how: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN, uri, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_two_first_runs_at_once_make_the_tables_of_a_new_database_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    command = [sys.executable, "-c", BEGIN, uri, "waits"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    printed = [process.communicate("\n") for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert {MlflowClient(uri).get_run(out.strip()).info.status for out, _ in printed} == {"FINISHED"}


def test_a_killed_run_is_marked_by_the_next_one_and_a_living_one_is_not(uri: str) -> None:
    gone, killed_id = begin(uri, "killed")
    assert gone.wait() == -signal.SIGKILL
    client = MlflowClient(uri)
    assert client.get_run(killed_id).info.status == "RUNNING"
    living, living_id = begin(uri, "waits")
    try:
        assert client.get_run(killed_id).info.status == "KILLED"
        run = start_run(uri, "qvl_pipeline", str(Path.cwd()), "third")
        run.finish("FINISHED")
        assert client.get_run(living_id).info.status == "RUNNING"
    finally:
        living.communicate("\n")
    assert client.get_run(living_id).info.status == "FINISHED"
    assert not list(known.FOLDER.glob("*.running"))


def empty(database: Path) -> None:
    database.write_bytes(b"")


def only_tables(database: Path) -> None:
    import sqlite3

    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM runs")


@pytest.mark.parametrize("lose", [empty, only_tables])
def test_a_database_without_the_runs_that_were_in_it_is_refused(uri: str, tmp_path: Path, lose: object) -> None:
    run = start_run(uri, "qvl_pipeline", str(Path.cwd()), "first")
    run.finish("FINISHED")
    lose(tmp_path / "mlflow.db")
    with pytest.raises(UserError, match=rf"mlflow.db has no runs any more, but run {run.id} was recorded in it: put"):
        start_run(uri, "qvl_pipeline", str(Path.cwd()), "second")


def test_a_deleted_database_is_begun_anew_with_a_warning(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start_run(uri, "qvl_pipeline", str(Path.cwd()), "first")
    run.finish("FINISHED")
    (tmp_path / "mlflow.db").unlink()
    with caplog.at_level(logging.WARNING):
        known.check_not_emptied(uri, tmp_path / "mlflow.db")
        known.check_not_emptied(uri, tmp_path / "mlflow.db")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'mlflow.db'} was deleted, with run {run.id} and all before it: a new one is begun"
    ]

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kedro.framework.project import pipelines

from tests.dvc_repository import command, commit, make_repository
from tests.kedro_project import make_project, use_quick_nodes

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a script Ctrl-C is ignored, also by what tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, to be copied: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def tracking_database(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> str:
    """One database for the whole session."""
    return f"sqlite:///{shutil.copy(empty_database, tmp_path_factory.mktemp('mlflow'))}"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_database: str) -> Iterator[Path]:
    """A project of quick nodes, entered, with the session's MLflow database."""
    import mlflow

    folder = make_project(tmp_path / "a project")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_database)
    use_quick_nodes(folder)
    yield folder
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)
    pipelines.configure("qvl_pipeline.pipeline_registry")


@contextlib.contextmanager
def _commands(tracking_database: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking_database)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> Path:
    with _commands(tracking_database):
        folder = make_repository(tmp_path_factory.mktemp("trained") / "project")
        command(folder, "kedro run --pipelines ingest,validate,sample,tokenize")
        command(folder, "kedro run --pipelines train,evaluate")
        command(folder, "dvc commit --force")
    commit(folder)
    return folder


@pytest.fixture(scope="module")
def trained(_trained: Path, tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> Iterator[Path]:
    """A repository as its owner would leave it, for one module, and the environment for commands in it.

    All stages have run, and `dvc.lock` is committed.
    """
    with _commands(tracking_database):
        yield shutil.copytree(_trained, tmp_path_factory.mktemp("repository") / "project", symlinks=True)

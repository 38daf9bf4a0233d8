from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kedro.framework.project import pipelines

from tests.kedro_project import make_project, use_quick_nodes


@pytest.fixture(scope="session")
def tracking_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the whole session: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


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

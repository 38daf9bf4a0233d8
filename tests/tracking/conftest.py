from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tracking.server import mlflow_server


@pytest.fixture(scope="session")
def server(tracking_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real MLflow server of the session's database."""
    with mlflow_server(tracking_database, tmp_path_factory.mktemp("server")) as port:
        yield port

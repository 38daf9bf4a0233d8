"""Resolvers for configuration files: places that do not depend on the folder a command is started in."""

from __future__ import annotations

import os
from pathlib import Path

from kedro.utils import find_kedro_project


def project_path(relative: str) -> str:
    """Return `relative` as an absolute path in the project.

    Under DVC this is the main repository: a DVC experiment runs in a temporary copy that is deleted afterwards, and
    would take its MLflow runs with it.
    """
    root = os.environ.get("DVC_ROOT") or find_kedro_project(Path.cwd()) or Path.cwd()
    return str(Path(root).resolve() / relative)


def tracking_uri(database: str) -> str:
    """Return the exported `MLFLOW_TRACKING_URI`, else the SQLite file `database` in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_path(database)}"

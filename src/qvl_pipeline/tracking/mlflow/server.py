"""The tracking server or database: whether it can be used, and what is said when it cannot."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from requests import RequestException

from qvl_pipeline.errors import UserError
from qvl_pipeline.locks import holding
from qvl_pipeline.secrets import without_secrets


def use_server(tracking_uri: str) -> None:
    """Let MLflow record in, and read from, a tracking server or database.

    A database in a file is opened once: where that fails, MLflow would try again for a minute. Then MLflow makes its
    tables, or brings them up to date, while no other process of this kind does: two first runs would do it at once.

    Raises:
        UserError: The database cannot be opened.
    """
    if tracking_uri.startswith("sqlite:///"):
        path = database(tracking_uri)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with holding(path.parent, wait=True):
                with contextlib.closing(sqlite3.connect(path)) as connection:
                    connection.execute("PRAGMA schema_version")
                _make_tables(tracking_uri)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"MLflow cannot record runs in {tracking_uri}: {'it is a folder' if path.is_dir() else error}. Let "
                "MLFLOW_TRACKING_URI, or tracking_uri in mlflow.yml, name a database file that can be written"
            ) from error
    mlflow.set_tracking_uri(tracking_uri)


def _make_tables(tracking_uri: str) -> None:
    with contextlib.suppress(MlflowException):  # the next request says what is wrong
        mlflow.MlflowClient(tracking_uri).search_experiments(max_results=1)


def database(tracking_uri: str) -> Path:
    """Return the file of a database that is one."""
    return Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0])


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Say in one sentence that the tracking server does not answer.

    Raises:
        UserError: It does not, whatever was asked.
    """
    try:
        yield
    except MlflowException as error:
        if isinstance(error.__context__, RequestException):
            raise unusable(error, "cannot be asked") from error
        raise


def unusable(error: MlflowException, what: str) -> UserError:
    """Return the error for people: of a server that is not there, without the objects that its client is made of."""
    reason = str(error)
    if isinstance(error.__context__, RequestException):
        system = re.findall(r"\[Errno -?\d+\] ([^'\")]+)", reason)
        said = system[-1] if system else type(error.__context__).__name__
        reason = (
            f"it does not answer ({said}). Start the server, or let MLFLOW_TRACKING_URI, or tracking_uri in "
            "mlflow.yml, name another"
        )
    return UserError(without_secrets(f"MLflow at {mlflow.get_tracking_uri()} {what}: {reason}"))


def is_recorded(run_id: str) -> bool:
    """Return whether the tracking server has a run; one that does not answer may have it."""
    try:
        mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        return error.get_http_status_code() != 404
    return True

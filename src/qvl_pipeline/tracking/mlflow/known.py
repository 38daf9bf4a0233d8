"""Runs that this project knows of whatever a database says: which go on, which were killed, which must be there.

In the folder `data/tracking`: a file for every run that goes on, locked by its process for as long as that lives, and
one for every database, with the last run that was begun in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from qvl_pipeline.errors import UserError
from qvl_pipeline.storage.whole import write_whole

logger = logging.getLogger(__name__)

FOLDER = Path("data/tracking")
_RUNNING = ".running"
# Open as long as their runs go on: the locks of this process.
_held: dict[str, TextIOWrapper] = {}


def note_begun(run_id: str, tracking_uri: str, folder: Path = FOLDER) -> None:
    """Note that a run goes on in this process, and that it is in this database from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(_last(tracking_uri, folder), json.dumps({"run_id": run_id}))
    file = (folder.absolute() / f"{run_id}{_RUNNING}").open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks: nobody could tell when this process is gone
        logger.info("%s cannot be locked (%s): if this run is killed, it stays RUNNING in MLflow", file.name, error)
        file.close()
        Path(file.name).unlink()
        return
    file.write(_name_of(tracking_uri))
    file.flush()
    _held[run_id] = file


def note_ended(run_id: str) -> None:
    """Note that a run of this process has ended, and that the tracking server knows or will know."""
    if file := _held.pop(run_id, None):
        Path(file.name).unlink(missing_ok=True)
        file.close()


def killed(tracking_uri: str, folder: Path = FOLDER) -> Iterator[str]:
    """Yield the runs in this database whose process is gone without a word; each once, if the caller deals with it."""
    for path in sorted(folder.glob(f"*{_RUNNING}")):
        with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            if file.read() == _name_of(tracking_uri):
                yield path.name.removesuffix(_RUNNING)
                path.unlink()


def check_not_emptied(tracking_uri: str, database: Path, folder: Path = FOLDER) -> None:
    """Refuse a database in a file that has no runs any more, though one is known to have been in it.

    Args:
        tracking_uri: What MLflow calls it.
        database: The file. One that was deleted is begun anew, with a warning.
        folder: Where such things are noted.

    Raises:
        UserError: Names the run and what to do.
    """
    last = _last(tracking_uri, folder)
    if not last.exists():
        return
    try:
        run_id = json.loads(last.read_text(encoding="utf-8"))["run_id"]
    except (ValueError, KeyError, TypeError):
        return
    if not database.exists():
        logger.warning("%s was deleted, with run %s and all before it: a new one is begun", database, run_id)
        last.unlink()
    elif not _has_runs(database):
        raise UserError(
            f"{database} has no runs any more, but run {run_id} was recorded in it: put a copy of it back, or delete "
            "the file to begin a new one"
        )


def _has_runs(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            return connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is not None
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return False
            raise


def _last(tracking_uri: str, folder: Path) -> Path:
    return folder / f"{_name_of(tracking_uri)}.json"


def _name_of(tracking_uri: str) -> str:
    # A server's address may hold a password.
    return hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]

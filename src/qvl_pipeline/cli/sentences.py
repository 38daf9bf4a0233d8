"""Errors that people can read: one sentence instead of a traceback when it is theirs to mend."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import click
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qvl_pipeline.errors import UserError
from qvl_pipeline.storage.room import is_full, no_room

# What a person can mend: data, parameters or the environment; and configuration files that cannot be read.
MENDABLE = (UserError, YAMLError, OmegaConfBaseException)
# So are these, whoever comes upon them: a read-only file system, no right to a file, too many of them open.
MACHINE = {errno.EROFS: "make it writable", errno.EACCES: "give the right to it", errno.EPERM: "give the right to it"}
MACHINE |= {errno.EMFILE: "allow more open files (`ulimit -n 4096`)", errno.ENAMETOOLONG: "choose shorter names"}


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Show what a person can mend as one sentence, and end with status 1."""
    try:
        yield
    except Exception as error:
        if cause := _mendable(error):
            raise click.ClickException(_sentence(cause)) from error
        raise


def _mendable(error: BaseException | None) -> BaseException | None:
    """Return the mendable error that `error` is or was caused by: Kedro wraps what a dataset raises while saving."""
    first = error
    while error is not None and not isinstance(error, MENDABLE):
        if isinstance(error, OSError) and error.errno in MACHINE:
            return error
        error = error.__cause__
    return first if error is None and is_full(first) else error


def _sentence(error: BaseException) -> str:
    if isinstance(error, MENDABLE):
        return str(error)
    if isinstance(error, OSError) and error.errno in MACHINE:
        where = f" ('{error.filename}')" if error.filename else ""
        return f"{error.strerror}{where}: {MACHINE[error.errno]}, and run the same command again"
    return no_room(_place(error), None, error)


def _place(error: BaseException | None) -> Path:
    """Return the file that there is no room for, or the current folder where nobody says which it is."""
    while error is not None:
        if isinstance(error, OSError) and error.filename:
            return Path(os.fsdecode(error.filename))
        error = error.__cause__ or error.__context__
    return Path.cwd()

"""Errors that people can read: one sentence instead of a traceback when it is theirs to mend."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import click
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qvl_pipeline.errors import UserError

# What a person can mend: data, parameters or the environment; and configuration files that cannot be read.
MENDABLE = (UserError, YAMLError, OmegaConfBaseException)
# So are these, whoever comes upon them: no space or quota left, a read-only file system, no right to a file.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


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
    while error is not None and not isinstance(error, MENDABLE):
        if isinstance(error, OSError) and error.errno in MACHINE:
            return error
        error = error.__cause__
    return error


def _sentence(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = f" ('{error.filename}')" if error.filename else ""
    return f"{error.strerror}{where}: make room or give the right to it, and run the same command again"

"""`kedro run`: what Kedro has, with endings and errors that people can read."""

from __future__ import annotations

import atexit
import contextlib
import copy
import multiprocessing.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from kedro.framework.cli.project import run as kedro_run

from qvl_pipeline.cli.selection import check_selection
from qvl_pipeline.cli.sentences import one_sentence
from qvl_pipeline.cli.waking import woken_by_signals
from qvl_pipeline.profiles.snippets import with_blocks
from qvl_pipeline.unfinished import unfinished_folder

# How the names of temporary folders of runs begin.
_TEMPORARY = "qvl-run-"
# Sockets of multiprocessing are in it, and the name of a socket has at most 107 bytes.
_LONGEST = 107 - len("/qvl-run-12345678/pymp-12345678/listener-12345678")


@woken_by_signals()
def _run(**options: Any) -> dict[str, Any]:
    _speak_utf8()
    signal.signal(signal.SIGTERM, _leave)
    _use_temporary_folder()
    # Threads of torch that wait for each other otherwise burn the cores that they wait for: on a busy CPU, the answers
    # of a tiny model take ten times as long. OpenMP reads this when torch is imported, which nothing has done so far.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options["pipeline"] and not options["pipelines"]:
        # The older spelling. Kedro warns that it will go; this project keeps it.
        options["pipelines"], options["pipeline"] = [options["pipeline"]], None
    if options["pipelines"] == ["replay"] and "run_id" in options["params"]:
        options["params"]["replay"] = {"run_id": options["params"].pop("run_id")}
    if "hardware" in options["params"]:
        options["params"].setdefault("preflight", {})["hardware"] = options["params"].pop("hardware")
    try:
        with one_sentence():
            options["params"] = with_blocks(options["params"] or {})
            check_selection(options)
            return kedro_run.callback(**options)
    except KeyboardInterrupt:
        click.echo("Aborted!", err=True)
        _end(128 + signal.SIGINT)
    except _Terminated as error:
        _end(error.code)


def _speak_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding.

    Names of files and what is printed would be refused otherwise, also by libraries. Processes that are started have
    the mode too.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _use_temporary_folder() -> None:
    """Give this run and all of its processes a temporary folder of their own: what killed ones leave goes with it.

    Where this process is killed itself, the next run removes it. What is to outlive a run stays where it was.
    """
    place = tempfile.gettempdir()
    if Path(place).name.startswith(_TEMPORARY):  # started by another run, as a replay does: that one's is ours, too
        return
    folder = unfinished_folder(Path(place if len(os.fsencode(place)) <= _LONGEST else "/tmp"), _TEMPORARY)
    # Not when the directory object's turn is, but after multiprocessing has removed its own folder, which is inside.
    folder._finalizer.atexit = False
    multiprocessing.util.Finalize(None, folder.cleanup, exitpriority=-200)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{place}/torchinductor_{os.getuid()}")
    os.environ["TMPDIR"] = tempfile.tempdir = folder.name


class _Terminated(SystemExit):
    """SIGTERM as an exception, so that every `finally` on the way out runs: children end, files are closed."""


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated(128 + signum)


def _end(status: int) -> NoReturn:
    """End this process as Python does, but without taking down the interpreter under threads that are still at work.

    Those of Daft would abort the process at that, with status 134.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(status))  # for whoever does not want to wait for what follows
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of a pipe has gone, too
            stream.flush()
    os._exit(status)


def _options() -> Iterator[click.Parameter]:
    """Kedro's options; of the profile it says another default than this project has."""
    for option in kedro_run.params:
        if option.name == "env":
            option = copy.copy(option)
            option.help = "Profile to run, a folder of conf/. Defaults to that of the embedded example."
        yield option


run = click.Command("run", params=list(_options()), callback=_run, help=kedro_run.help)

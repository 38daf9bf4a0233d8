"""`kedro sweep`: many trainings that differ in some parameters."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

import click
from kedro.framework.startup import bootstrap_project
from kedro.utils import find_kedro_project

from qvl_pipeline.cli.sentences import one_sentence
from qvl_pipeline.cli.waking import woken_by_signals


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@woken_by_signals()
def sweep(file: Path) -> None:
    """Try values of parameters, as FILE says, and rank them.

    Run again after it was cut off, it goes on where it was.
    """
    with one_sentence():
        project = find_kedro_project(Path.cwd()) or Path.cwd()
        bootstrap_project(project)
        from qvl_pipeline.sweeps.sweep import Sweep, read_sweep

        config = read_sweep(file)
        os.chdir(project)
        signal.signal(signal.SIGTERM, _interrupt)
        Sweep(config, project, say=click.echo).run()


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

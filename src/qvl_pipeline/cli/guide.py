"""`kedro guide`: what concerns configurations of LMMS Engine, and of its training guide."""

from __future__ import annotations

from pathlib import Path

import click
from kedro.utils import find_kedro_project

from qvl_pipeline.cli.sentences import one_sentence

# As the guide starts its examples: torchrun --nproc_per_node=8.
GUIDE_RANKS = 8


@click.group()
def guide() -> None:
    """Take over configurations of LMMS Engine."""


@guide.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--name", required=True, help="Name of the profile.")
@click.option(
    "--data-parallel-size",
    default=GUIDE_RANKS,
    show_default=True,
    type=click.IntRange(min=1),
    help="GPUs that the file was made for, by its sp_ulysses_degree: they are a factor of its global batch.",
)
def import_(file: Path, name: str, data_parallel_size: int) -> None:
    """Make a profile of FILE, in any form that LMMS Engine has had: conf/NAME/globals.yml and parameters.yml.

    Every key becomes a parameter, or is named with the reason why it cannot; then nothing is written.
    """
    from qvl_pipeline.profiles.lmms.writing import import_profile

    with one_sentence():
        project = find_kedro_project(Path.cwd()) or Path.cwd()
        import_profile(project, file, name, data_parallel_size=data_parallel_size, say=click.echo)

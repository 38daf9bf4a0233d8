"""`kedro profile`: what concerns profiles, so far making one."""

from __future__ import annotations

from pathlib import Path

import click
from kedro.utils import find_kedro_project

from qvl_pipeline.cli.sentences import one_sentence


@click.group()
def profile() -> None:
    """Make profiles."""


@profile.command()
@click.argument("name")
@click.option("--like", default="qwen3_vl_8b", show_default=True, help="Profile whose model and parameters it takes.")
@click.option(
    "--data", required=True, help="File of rows, or folder of such files: Parquet, JSON, JSONL, CSV, Arrow, WebDataset."
)
@click.option("--data-folder", help="Folder where media paths in rows start.  [default: the folder of the data]")
def new(name: str, like: str, data: str, data_folder: str | None) -> None:
    """Make a profile with a dataset of your own: conf/NAME/globals.yml and parameters.yml.

    The first rows are read as `kedro run` would; when none of them can be used, nothing is written.
    """
    # Readers of tables, which no other command needs.
    from qvl_pipeline.profiles.new import new_profile

    with one_sentence():
        new_profile(find_kedro_project(Path.cwd()) or Path.cwd(), name, like, data, data_folder, say=click.echo)

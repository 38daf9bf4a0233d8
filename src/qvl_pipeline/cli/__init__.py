"""Commands of this project: `kedro run` and `kedro profile`."""

import click

from qvl_pipeline.cli.profile import profile
from qvl_pipeline.cli.run import run

cli = click.Group(name="qvl_pipeline", help="Commands of this project.", commands=[run, profile])

"""Commands of this project: `kedro run`, `kedro profile` and `kedro guide`."""

import click

from qvl_pipeline.cli.guide import guide
from qvl_pipeline.cli.profile import profile
from qvl_pipeline.cli.run import run

cli = click.Group(name="qvl_pipeline", help="Commands of this project.", commands=[run, profile, guide])

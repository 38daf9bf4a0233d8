"""Commands of this project: `kedro run`, `kedro profile` and `kedro submit`."""

import click

from qvl_pipeline.cli.profile import profile
from qvl_pipeline.cli.run import run
from qvl_pipeline.cli.submit import submit

cli = click.Group(name="qvl_pipeline", help="Commands of this project.", commands=[run, profile, submit])

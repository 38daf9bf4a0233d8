"""Commands of this project: `kedro run`, `kedro profile`, `kedro guide`, `kedro sweep` and `kedro submit`."""

import click

from qvl_pipeline.cli.guide import guide
from qvl_pipeline.cli.profile import profile
from qvl_pipeline.cli.run import run
from qvl_pipeline.cli.submit import submit
from qvl_pipeline.cli.sweep import sweep

cli = click.Group(name="qvl_pipeline", help="Commands of this project.", commands=[run, profile, guide, sweep, submit])

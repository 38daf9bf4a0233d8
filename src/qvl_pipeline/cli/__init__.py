"""Commands of this project: `kedro run`, `profile`, `models`, `guide`, `sweep` and `submit`."""

import click

from qvl_pipeline.cli.guide import guide
from qvl_pipeline.cli.models import models
from qvl_pipeline.cli.profile import profile
from qvl_pipeline.cli.run import run
from qvl_pipeline.cli.submit import submit
from qvl_pipeline.cli.sweep import sweep

cli = click.Group(
    name="qvl_pipeline", help="Commands of this project.", commands=[run, profile, models, guide, sweep, submit]
)

"""`kedro submit`: a training as a job of a cluster."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from kedro.utils import find_kedro_project

from qvl_pipeline.cli.sentences import one_sentence
from qvl_pipeline.submit.job import TARGETS, make_job, render, send


@click.command()
@click.option("--to", "target", type=click.Choice(list(TARGETS)), required=True, help="The cluster.")
@click.option("--env", "-e", help="Profile.  [default: that of kedro run]")
@click.option("--hardware", default="", help="Such as 2x8xH100-80GB.  [default: preflight.hardware of the profile]")
@click.option("--hours", default=0, help="Time limit.  [default: by the preflight's last answer, else 24]")
@click.option("--params", default="", help="More parameters of the run, as given to kedro run.")
@click.option("--image", default="", help="Container image, where the cluster wants one.")
@click.option("--go", is_flag=True, help="Send it; otherwise it is only printed.")
def submit(target: str, env: str | None, hardware: str, hours: int, params: str, image: str, go: bool) -> None:
    """Write the batch script, TrainJob or SkyPilot task that trains a profile, and print it; with --go, send it."""
    # The configuration, which takes longer to import than click.
    from kedro.framework.project import settings
    from kedro.framework.startup import bootstrap_project

    from qvl_pipeline.profiles.checking import check_parameters
    from qvl_pipeline.profiles.loader import ProfileLoader

    with one_sentence():
        root = find_kedro_project(Path.cwd()) or Path.cwd()
        bootstrap_project(root)
        loader = ProfileLoader(str(root / "conf"), env=env, **settings.CONFIG_LOADER_ARGS)
        preflight = check_parameters(loader["parameters"], loader.origins)["preflight"]
        report = root / loader["catalog"]["preflight_report"]["filepath"]
        hardware = hardware or preflight.hardware
        job = make_job(loader.profile.name, hardware, report, hours=hours, parameters=params, image=image)
        text = render(target, job)
        click.echo(text, nl=False)
        if go:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", prefix=f"{job.name}-", suffix=".job", delete=False
            ) as file:
                file.write(text)
            send(target, Path(file.name))

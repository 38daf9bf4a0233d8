"""What a cluster is told of a training, and the command that tells it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qvl_pipeline.config.preflight import HARDWARE
from qvl_pipeline.errors import UserError

# For each cluster: its template, and the command that takes the description as a file.
TARGETS = {
    "slurm": ("slurm.sbatch.j2", ("sbatch",)),
    "kubeflow": ("kubeflow.yaml.j2", ("kubectl", "apply", "-f")),
    "skypilot": ("skypilot.yaml.j2", ("sky", "jobs", "launch", "-y")),
}
# Hours where nobody knows how long it takes; of a time that is foretold, a quarter more, and half an hour to start,
# save, evaluate and export.
_UNKNOWN_HOURS, _MARGIN, _AROUND_HOURS = 24, 1.25, 0.5
_IMAGE = "registry.example.com/qvl-pipeline:latest"


@dataclass(frozen=True)
class Job:
    """A training on a cluster.

    Attributes:
        profile: Name of the profile.
        nodes: Machines.
        gpus: GPUs of each.
        gpu: Name of a GPU, such as `H100`; empty for any.
        hours: Time limit.
        parameters: More parameters, as given to `--params`.
        image: Container image, where the cluster wants one.
    """

    profile: str
    nodes: int
    gpus: int
    gpu: str
    hours: int
    parameters: str = ""
    image: str = _IMAGE

    @property
    def name(self) -> str:
        """Name of the job: lower case, digits and hyphens."""
        return self.profile.lower().replace("_", "-").replace(".", "-")

    @property
    def params(self) -> str:
        """All that is given to `--params`: a process that fails is started again, from the newest checkpoint."""
        return ",".join(filter(None, ["train.launch.max_restarts=2", self.parameters]))


def make_job(
    profile: str, hardware: str, report: Path, *, hours: int = 0, parameters: str = "", image: str = ""
) -> Job:
    """Describe the training of a profile.

    Args:
        profile: Its name.
        hardware: As `preflight.hardware`: `8xH100-80GB`, or `2x8xH100-80GB` for two nodes.
        report: Its `preflight.json`, which need not be there: the time limit follows from it.
        hours: Time limit; 0 takes that of the preflight, or a day.
        parameters: More parameters, as given to `--params`.
        image: Container image.

    Raises:
        UserError: The hardware is not named.
    """
    match = HARDWARE.fullmatch(hardware)
    if match is None:
        raise UserError(
            f"on what is '{profile}' to be trained? hardware is '{hardware}': give --hardware 8xH100-80GB (or "
            "2x8xH100-80GB for two nodes), or set preflight.hardware in the profile"
        )
    nodes, gpus = int(match["nodes"] or 1), int(match["gpus"])
    limit = hours or _hours_of(report, nodes * gpus)
    return Job(profile, nodes, gpus, match["name"].strip().replace(" ", ""), limit, parameters, image or _IMAGE)


def _hours_of(report: Path, ranks: int) -> int:
    """Hours that the preflight foretold for so many ranks, with a margin; a day where it did not."""
    if not report.exists():
        return _UNKNOWN_HOURS
    said = json.loads(report.read_text(encoding="utf-8"))
    if not said.get("time") or said["hardware"]["ranks"] != ranks:
        return _UNKNOWN_HOURS
    return math.ceil(said["time"]["hours"] * _MARGIN + _AROUND_HOURS)


def render(target: str, job: Job) -> str:
    """Write the description of a job.

    Args:
        target: `slurm`, `kubeflow` or `skypilot`.
        job: The job.
    """
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    values = asdict(job) | {"name": job.name, "params": job.params}
    return environment.get_template(TARGETS[target][0]).render(values)


def send(target: str, description: Path) -> None:
    """Send a description to its cluster.

    Raises:
        UserError: The command is not there, or fails.
    """
    command = TARGETS[target][1]
    if shutil.which(command[0]) is None:
        raise UserError(
            f"`{command[0]}` is not on this machine: run `{' '.join(command)} {description}` where it is, or leave out "
            "--go to see the description only"
        )
    done = subprocess.run([*command, str(description)], check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(command)} {description}` ended with status {done.returncode}: see above")

"""`python -m qvl_pipeline.launch config_yaml=FILE`: a configuration of LMMS Engine, imported and run in one go.

In place of the guide's `torchrun … -m lmms_engine.launch.cli config_yaml=FILE`, and without torchrun: the stage `train`
starts the processes, one for each GPU. The profile stays, so that the same command continues a run that was cut off.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import yaml
from kedro.utils import find_kedro_project

from qvl_pipeline.cli.sentences import one_sentence
from qvl_pipeline.config import BLOCKS
from qvl_pipeline.errors import UserError, did_you_mean

_OWN = ("config_yaml", "name", "data_parallel_size")


@click.command()
@click.argument(
    "assignments", nargs=-1, metavar="config_yaml=FILE [name=NAME] [data_parallel_size=N] [BLOCK.KEY=VALUE]..."
)
def launch(assignments: tuple[str, ...]) -> None:
    """Import FILE as the profile NAME (by default, the name of the file), and run all stages.

    Parameters of this project may follow, such as train.learning_rate=1e-5, for this run only. data_parallel_size is by
    default the number of GPUs here, over sp_ulysses_degree.
    """
    from qvl_pipeline.profiles.lmms.writing import import_profile

    with one_sentence():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(
                "start this without torchrun, `python -m qvl_pipeline.launch …`: it starts the processes itself"
            )
        own, parameters = _split(assignments)
        project, file = find_kedro_project(Path.cwd()) or Path.cwd(), Path(own["config_yaml"])
        name = own.get("name") or re.sub(r"\W", "_", file.stem)
        ranks = _ranks(own.get("data_parallel_size"), project / "conf" / name, file)
        import_profile(project, file, name, data_parallel_size=ranks, say=click.echo)
    # In place of this process, so that signals reach the run itself.
    given = ["--params", ",".join(parameters)] if parameters else []
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "kedro", "run", "--env", name, *given])


def _split(assignments: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return what is said to this command, and parameters of the run."""
    own: dict[str, str] = {}
    parameters: list[str] = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if key.startswith("hydra"):
            raise UserError(f"'{assignment}': Hydra is not used here, and there are no folders to clash: leave it out")
        if not equals:
            raise UserError(f"'{assignment}' must be key=value, such as config_yaml=FILE")
        if key in _OWN:
            own[key] = value
        elif key.split(".")[0] in BLOCKS and "." in key:
            if "," in value:
                raise UserError(f"'{assignment}': a value with a comma cannot be given here: write it into the profile")
            parameters.append(assignment)
        else:
            hint = did_you_mean(key, _OWN, f"parameters are named with their block, as in train.{key}")
            raise UserError(f"'{key}' is nothing that can be set here: {hint}")
    if "config_yaml" not in own:
        raise UserError("config_yaml=FILE is missing: the configuration to run")
    return own, parameters


def _ranks(given: str | None, profile: Path, file: Path) -> int:
    """Return the data-parallel ranks of the global batch: as given, as an earlier call has left it, or by the GPUs."""
    if given is not None:
        if not given.isdigit() or int(given) < 1:
            raise UserError(f"data_parallel_size must be a whole number of at least 1, but is '{given}'")
        return int(given)
    made = profile / "parameters.yml"
    if made.is_file():
        batching = (yaml.safe_load(made.read_text(encoding="utf-8")) or {}).get("batching") or {}
        return batching.get("data_parallel_size") or 1
    import torch

    from qvl_pipeline.profiles.lmms.reading import read_entries

    entries = read_entries(file)
    degree = entries["sp_ulysses_degree"].value if "sp_ulysses_degree" in entries else 1
    return max(torch.cuda.device_count() // max(int(degree), 1), 1)


if __name__ == "__main__":
    launch()

"""Repeats a recorded run in a git worktree, and compares every number with the record.

The worktree gets the run's commit with the changes that were recorded, its parameters instead of those of the commit,
and the data it read, told by digest. Its runs go to the same MLflow, tagged `replay_of`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import yaml
from kedro.framework.project import pipelines

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.mlflow.chain import ABOVE
from qvl_pipeline.tracking.replay.comparison import compare_data, compare_numbers, compare_weights, is_same
from qvl_pipeline.tracking.replay.data import MADE_AGAIN, get_data
from qvl_pipeline.tracking.replay.repeatable import RecordedRun, evaluations, read_run

logger = logging.getLogger(__name__)

WORKTREES = Path("data/replay")
PROFILE = "replay"


def replay_run(run_id: str, project: Path) -> dict[str, Any]:
    """Repeat a run and its evaluation.

    Args:
        run_id: The run.
        project: Root of the project.

    Returns:
        The report: `run_id`, `commit`, `replayed_as` (ids of the new runs), `inputs` (how each was got), `compared`
        (how many numbers and digests), `differences` (`metric`, `step`, `recorded`, `replayed`; `None` where one of
        them has no such number): those of the data first, then by step.

    Raises:
        UserError: The run cannot be repeated, or its repetition failed.
    """
    training = read_run(run_id)
    runs = [training, *evaluations(training)]
    inputs = _inputs(runs)
    new = []
    with _worktree(project, training) as folder:
        _write_profile(folder, training)
        how = get_data(project, folder, PROFILE, training, inputs)
        if remade := [name for name, way in how.items() if way == MADE_AGAIN]:
            logger.info("neither data/ nor DVC has %s as the run read it", ", ".join(remade))
            _kedro_run(folder, _stages_before(training), training)
        for run in runs:
            _write_profile(folder, run)
            new.append(_kedro_run(folder, run.pipelines, run))
    scored = len(runs) > 1 or "evaluate" in (training.pipelines or ("evaluate",))
    compared = compare_data(training.id, new[0], inputs) + compare_numbers(training.id, new[0], scores=scored)
    compared += compare_weights(training.id, new[0])
    return {
        "run_id": run_id,
        "commit": training.commit,
        "replayed_as": new,
        "inputs": how,
        "compared": len(compared),
        "differences": [row for row in compared if not is_same(row)],
    }


@contextlib.contextmanager
def _worktree(project: Path, run: RecordedRun) -> Iterator[Path]:
    """Check out the code of a run; removed afterwards, whatever happens."""
    folder = project / WORKTREES / run.id
    _remove(project, folder)
    try:
        _git(project, "worktree", "add", "--quiet", "--detach", str(folder), run.commit)
        if run.patch:
            _git(folder, "apply", "--whitespace=nowarn", "-", given=run.patch)
        yield folder
    finally:
        _remove(project, folder)


def _remove(project: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _git(project, "worktree", "prune")


def _git(folder: Path, *arguments: str, given: str | None = None) -> None:
    done = subprocess.run(["git", "-C", str(folder), *arguments], input=given, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run a command to its end, and return its status; interrupted, let it end in its own way (`run` would kill it)."""
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _write_profile(folder: Path, run: RecordedRun) -> None:
    """Give the worktree a profile with exactly the parameters of the run, and the catalog of its profile."""
    # A merge could not take away what these add to a mapping.
    for path in (folder / "conf" / "base").glob("parameters*.yml"):
        path.unlink()
    profile = folder / "conf" / PROFILE
    profile.mkdir(exist_ok=True)
    for path in (folder / "conf" / run.profile).glob("catalog*.yml"):
        shutil.copy(path, profile)
    names = {"profile": run.profile, "dataset": run.dataset}
    (profile / "globals.yml").write_text(yaml.safe_dump(names), encoding="utf-8")
    (profile / "parameters.yml").write_text(yaml.safe_dump(run.parameters), encoding="utf-8")


def _name_next_run(project: Path, folder: Path, label: str) -> None:
    """Name what runs in the worktree, in the place where this person's runs go: no commit has `conf/local`.

    It registers nothing: its model is gone with the worktree, and an alias would point there.
    """
    local = project / "conf" / "local" / "mlflow.yml"
    own = yaml.safe_load(local.read_text(encoding="utf-8")) if local.exists() else None
    (folder / "conf" / PROFILE / "mlflow.yml").write_text(
        yaml.safe_dump({**(own or {}), "run_name": label, "register_model": None}), encoding="utf-8"
    )


def _inputs(runs: list[RecordedRun]) -> dict[str, str]:
    """Return the digest of every entry that `runs` read and did not write themselves."""
    written = set().union(
        *(pipelines[name].all_outputs() for run in runs for name in run.pipelines or ("__default__",))
    )
    return {name: digest for run in runs for name, digest in run.inputs.items() if name not in written}


def _stages_before(run: RecordedRun) -> tuple[str, ...]:
    """Return the names of the stages that make what `run` reads."""
    before = []
    for name in pipelines:
        if name in run.pipelines:
            break
        before.append(name)
    return tuple(before)


def _kedro_run(folder: Path, names: tuple[str, ...], run: RecordedRun) -> str:
    """Run pipelines in the worktree; return the id of their MLflow run."""
    label = f"replay of {run.id} {uuid.uuid4().hex[:8]}"
    _name_next_run(Path.cwd(), folder, label)
    options = ["--pipelines", ",".join(names)] if names else []
    # They would say that this is a stage of DVC, or that run, or a point of a sweep.
    others = ("DVC_", "MLFLOW_RUN_ID", ABOVE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    environment["MLFLOW_TRACKING_URI"] = mlflow.get_tracking_uri()
    command = [sys.executable, "-m", "kedro", "run", *options, "--env", PROFILE]
    logger.info("in %s: kedro run %s", folder, " ".join(options))
    if _run(command, folder, environment):
        raise UserError(f"the replay of {run.id} failed: its output above says why")
    client = mlflow.MlflowClient()
    (new,) = client.search_runs([run.experiment_id], f"attributes.run_name LIKE '{label}%'")
    client.set_tag(new.info.run_id, "replay_of", run.id)
    return new.info.run_id

"""Repeats a recorded run in a git worktree, and compares every number with the record.

The worktree gets the run's commit with the changes that were recorded, its parameters instead of those of the commit,
and the data it read, told by digest. Its runs go to the same MLflow, tagged `replay_of`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import yaml
from kedro.config import OmegaConfigLoader
from kedro.framework.project import pipelines

from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.data_version import data_version
from qvl_pipeline.tracking.repeatable import RecordedRun, evaluations, numbers_of, read_run

logger = logging.getLogger(__name__)

WORKTREES = Path("data/replay")
RAW = Path("data/01_raw")
PROFILE = "replay"
# How fast it went, with how much memory, and which rank was the slowest: no property of what was computed.
MEASURED = re.compile(r"^system/|per_second|_s$|tflops|mfu|slowest|fastest|wait|memory")


def replay_run(run_id: str, project: Path) -> dict[str, Any]:
    """Repeat a run and its evaluation.

    Args:
        run_id: The run.
        project: Root of the project.

    Returns:
        The report: `run_id`, `commit`, `replayed_as` (ids of the new runs), `inputs` (how each was got), `compared`
        (numbers that were compared), `differences` (`metric`, `step`, `recorded`, `replayed`; `None` where one of them
        has no such number).

    Raises:
        UserError: The run cannot be repeated, or its repetition failed.
    """
    training = read_run(run_id)
    runs = [training, *evaluations(training)]
    new_runs = []
    with _worktree(project, training) as folder:
        _write_profile(folder, training)
        inputs = _get_data(project, folder, training, _inputs(runs))
        if remade := [name for name, how in inputs.items() if how == "made again"]:
            logger.info("not in data/ as the run read them: %s", ", ".join(remade))
            _kedro_run(folder, _stages_before(training), training)
        for run in runs:
            _write_profile(folder, run)
            new_runs.append(_kedro_run(folder, run.pipelines, run))
    differences, compared = _compared(training.id, new_runs[0])
    for recorded, new in zip(runs[1:], new_runs[1:], strict=True):
        compared += 1
        differences += _compared_weights(recorded, new)
    return {
        "run_id": run_id,
        "commit": training.commit,
        "replayed_as": new_runs,
        "inputs": inputs,
        "compared": compared,
        "differences": differences,
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
    done = subprocess.run(["git", "-C", str(folder), *arguments], input=given, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")


def _write_profile(folder: Path, run: RecordedRun) -> None:
    """Give the worktree a profile with exactly the parameters of the run."""
    # A merge could not take away what these add to a mapping.
    for path in (folder / "conf" / "base").glob("parameters*.yml"):
        path.unlink()
    profile = folder / "conf" / PROFILE
    profile.mkdir(exist_ok=True)
    names = {"profile": run.profile, "dataset": run.dataset}
    (profile / "globals.yml").write_text(yaml.safe_dump(names))
    (profile / "parameters.yml").write_text(yaml.safe_dump(run.parameters))


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


def _get_data(project: Path, folder: Path, run: RecordedRun, inputs: dict[str, str]) -> dict[str, str]:
    """Link the raw data and the inputs of the run into the worktree.

    Returns:
        How each input was got: `linked` (it is in the project as the run read it), or `made again`, which is then all
        of them, from the raw data on.
    """
    catalog = OmegaConfigLoader(
        str(folder / "conf"), base_env="base", default_run_env="local", env=PROFILE, merge_strategy={"globals": "soft"}
    )["catalog"]
    paths = {name: Path(catalog[name]["filepath"]) for name in inputs if name in catalog}
    raw_is_same = _raw_fingerprint(project / catalog["raw_manifest"]["filepath"]) == run.data_fingerprint
    demo = (run.parameters.get("ingest") or {}).get("demo")
    _link(project / RAW, folder / RAW, without=None if raw_is_same or not demo else project / demo["folder"])
    same = (raw_is_same or not paths) and all(
        (project / path).exists() and data_version(project / path).digest == inputs[name]
        for name, path in sorted(paths.items())
    )
    if same:
        for path in paths.values():
            _link(project / path, folder / path)
    return dict.fromkeys(paths, "linked" if same else "made again")


def _raw_fingerprint(manifest: Path) -> str:
    return json.loads(manifest.read_text())["fingerprint"] if manifest.exists() else ""


def _link(source: Path, target: Path, without: Path | None = None) -> None:
    """Copy a file or folder by hard links, which take no space; nothing that a run reads is written to."""
    if source.is_dir():
        left_out = [without.name] if without else []
        shutil.copytree(
            source, target, copy_function=_link_file, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out)
        )
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _kedro_run(folder: Path, names: tuple[str, ...], run: RecordedRun) -> str:
    """Run pipelines in the worktree; return the id of their MLflow run."""
    label = f"replay of {run.id} {uuid.uuid4().hex[:8]}"
    (folder / "conf" / PROFILE / "mlflow.yml").write_text(yaml.safe_dump({"run_name": label}))
    options = ["--pipelines", ",".join(names)] if names else []
    # `DVC_*` and `MLFLOW_RUN_ID` would say that this is a stage of DVC, or that run.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_RUN_ID"))}
    environment["MLFLOW_TRACKING_URI"] = mlflow.get_tracking_uri()
    command = [sys.executable, "-m", "kedro", "run", *options, "--env", PROFILE]
    logger.info("in %s: kedro run %s", folder, " ".join(options))
    if subprocess.run(command, cwd=folder, env=environment).returncode:
        raise UserError(f"the replay of {run.id} failed: its output above says why")
    client = mlflow.MlflowClient()
    (new,) = client.search_runs([run.experiment_id], f"attributes.run_name LIKE '{label}%'")
    client.set_tag(new.info.run_id, "replay_of", run.id)
    return new.info.run_id


def _compared(recorded_id: str, new_id: str) -> tuple[list[dict[str, Any]], int]:
    """Return every number that differs, and how many were compared."""
    recorded, new = (
        {key: value for key, value in numbers_of(run_id).items() if not MEASURED.search(key[0])}
        for run_id in (recorded_id, new_id)
    )
    keys = sorted(recorded.keys() | new.keys())
    differences = [
        {"metric": name, "step": step, "recorded": recorded.get((name, step)), "replayed": new.get((name, step))}
        for name, step in keys
        if not _same(recorded.get((name, step)), new.get((name, step)))
    ]
    return differences, len(keys)


def _same(one: float | None, other: float | None) -> bool:
    both_nan = one is not None and other is not None and math.isnan(one) and math.isnan(other)
    return one == other or both_nan


def _compared_weights(recorded: RecordedRun, new_id: str) -> list[dict[str, Any]]:
    """Return the difference between the digests of the models that two evaluations read, if there is one."""
    new = {
        entry.dataset.name: entry.dataset.digest
        for entry in mlflow.MlflowClient().get_run(new_id).inputs.dataset_inputs
    }
    before, after = recorded.inputs.get("trained_model"), new.get("trained_model")
    row = {"metric": "weights", "step": None, "recorded": before, "replayed": after}
    return [] if before == after else [row]

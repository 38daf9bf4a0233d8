"""Six-stage runs of the smallest example in which a process is killed, and what must be the same afterwards.

A disturbance is a function that gets the running command and a random generator, does its harm, and says what it did;
nothing, when it came too late.
Kills are in `kills.py`; whatever else is to be survived (damaged files, full disks) is another function of this kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil

from tests.dvc_repository import make_repository

# With a loader process of each rank: the example itself has none.
COMMAND = [sys.executable, "-m", "kedro", "run", "--params", "train.dataloader_num_workers=1"]
# In the environment of all processes of a trial, by which those that are left are found.
MARK = "QVL_CHAOS_TRIAL"
LONGEST_RUN_S = 540
# Times, and what is about them; pages that show them. The numbers in them are compared one by one.
VOLATILE = {
    *("training_metrics.csv", "train_result.json", "report.html", "model_card.md", "README.md"),
    *("preflight.html", "preflight.json"),  # what is free on the disk
    "digests.json",  # has that of README.md; the weights are compared themselves
}
TIMELESS = ["step", "epoch", "learning_rate", "grad_norm", "loss", "tokens", "supervised_tokens"]
# What a run makes beside its results, and must not leave.
LEFT_BEHIND = ("**/.*.partial", "**/*.partial", "**/.*.old", "**/.*.building", "**/.unfinished-*", "**/.*.removed")

Disturbance = Callable[["Run", random.Random], str]


@dataclass
class Run:
    """A run of the command in a project.

    Attributes:
        folder: The project.
        process: The command.
        seconds: How long an undisturbed run takes.
        mark: What all of its processes have in their environment.
    """

    folder: Path
    seconds: float = 30.0
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with a folder for its temporary files; its output goes to `chaos.log` beside the project."""
        temporary = self.temporary
        temporary.mkdir(exist_ok=True)
        environment = os.environ | {MARK: self.mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                COMMAND, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def temporary(self) -> Path:
        """The folder of its temporary files."""
        return self.folder.parent / "t"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder.parent / "chaos.log"

    def wait(self) -> int:
        """Wait for its end, and for that of its processes, which may take a moment; return the status."""
        status = self.process.wait(LONGEST_RUN_S)
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not (left := self.processes()), f"left: {[(p.pid, p.cmdline()) for p in left]}"
        return status

    def processes(self) -> list[psutil.Process]:
        """Find its processes, wherever they were moved to."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def undisturbed(folder: Path) -> Run:
    """Run the command once; the reference of all trials."""
    run = Run(make_repository(folder))
    started = time.monotonic()
    run.start()
    assert run.wait() == 0, run.log.read_text()
    run.seconds = time.monotonic() - started
    return run


def trial(folder: Path, reference: Run, disturbances: list[Disturbance], rng: random.Random, done: list[str]) -> None:
    """Run the command once for each disturbance, and once more in peace; then everything must be as in the reference.

    Args:
        folder: Where to make the project.
        reference: The undisturbed run.
        disturbances: What is done, to a run each.
        rng: Decides when, and to which process.
        done: Gets what was done to each run that it did not come too late for, and how that ended.

    Raises:
        AssertionError: The last run fails, something differs, or something is left.
    """
    run = Run(make_repository(folder), reference.seconds)
    for disturb in disturbances:
        run.start()
        what = disturb(run, rng)
        status = run.wait()
        if what:
            done.append(f"{what}; ended with {status}")
    run.start()
    status = run.wait()
    assert status == 0, f"the undisturbed run failed with {status}:\n{run.log.read_text()[-6000:]}"
    compare(run, reference)


def compare(run: Run, reference: Run) -> None:
    """Compare tables, frames, weights, losses and MLflow's values bit for bit, and look for what was left."""
    ours, theirs = digests(run.folder), digests(reference.folder)
    assert (differing := sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))) == [], differing
    assert losses(run.folder) == losses(reference.folder)
    assert recorded(run.folder) == recorded(reference.folder)
    left = [path for pattern in LEFT_BEHIND for path in (run.folder / "data").glob(pattern)]
    # Compiled code is to outlive a run.
    left += [path for path in run.temporary.iterdir() if not path.name.startswith("torchinductor_")]
    left += list((run.folder / "data").glob("06_models/*/scratch/*/checkpoints"))
    left += list((run.folder / "data").glob("06_models/*/scratch/*/export"))
    assert left == []


def digests(project: Path) -> dict[str, str]:
    """Digest every file that is a result, by its path."""
    data = project / "data"
    files = [path for path in data.rglob("*") if path.is_file() and path.name not in VOLATILE]
    return {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        # What `tracking` has are names of MLflow runs.
        if not {"scratch", "tracking"} & set(path.parts)
    }


def losses(project: Path) -> str:
    """Return the logged steps without their times."""
    [path] = (project / "data/08_reporting").glob("*/training_metrics.csv")
    return pd.read_csv(path)[TIMELESS].to_csv(index=False)


def recorded(project: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves and metrics of the newest MLflow run, as far as they are not about time."""
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        [(run_id, status)] = database.execute(
            "SELECT run_uuid, status FROM runs ORDER BY start_time DESC LIMIT 1"
        ).fetchall()
        assert status == "FINISHED"
        rows = database.execute("SELECT key, step, value FROM metrics WHERE run_uuid = ?", [run_id]).fetchall()
    timeless = {f"train/{name}" for name in TIMELESS}
    kept = sorted(row for row in rows if not row[0].startswith("system/") and not row[0].startswith("train/"))
    kept += sorted(row for row in rows if row[0] in timeless or row[0].startswith("train/loss_by_source/"))
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in kept:
        curves.setdefault(key, []).append((step, value))
    result = json.loads(next((project / "data/08_reporting").glob("*/train_result.json")).read_text())
    assert result["mlflow_run_id"] == run_id
    return curves

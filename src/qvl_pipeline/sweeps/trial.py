"""One trial: configuration and results in folders of its own, the data of the profile linked into them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from kedro.framework.project import pipelines

from qvl_pipeline.config.sweep import Objective
from qvl_pipeline.errors import UserError
from qvl_pipeline.profiles.loader import BASE, LOCAL
from qvl_pipeline.storage.whole import write_whole
from qvl_pipeline.tracking.flattening import numbers
from qvl_pipeline.tracking.lineage.dvc_cache import link_file

# Stages whose results are a profile's own.
STAGES = ("sample", "tokenize", "train", "evaluate")
_LAYERS = ("data/05_model_input", "data/06_models", "data/07_model_output", "data/08_reporting")
# What training and evaluation make, of which a trial makes its own.
_NOT_LINKED = ("scratch", "trained", "checkpoints", "metrics.json", "train_result.json", "training_metrics.csv")
_POLL_S = 0.2
# A trial ends with its sweep, however that ends: two that write to one place would follow.
_WITH_THE_SWEEP = (
    "import os, signal, sys; from qvl_pipeline.orphans import end_with_parent; end_with_parent(signal.SIGTERM); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
Values = dict[str, Any]


@dataclass
class Trial:
    """Values that are tried, and what came of it.

    Attributes:
        values: By the dotted name of each parameter.
        state: `running` until it is over: `done`, `pruned` or `failed`.
        objective: What was sought.
        reported: `eval_loss` by step.
    """

    values: Values
    state: str = "running"
    objective: float | None = None
    reported: dict[int, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Eight digits that the same values always have."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def label(self) -> str:
        """The values as people read them: `learning_rate=0.001 seed=3`."""
        return " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in self.values.items())

    def save(self, folder: Path) -> None:
        """Write what is known of it."""
        values = {"values": self.values, "state": self.state, "objective": self.objective, "reported": self.reported}
        write_whole(folder / f"{self.id}.json", json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Trial:
        """Read what is known of one."""
        known = json.loads(path.read_text(encoding="utf-8"))
        known["reported"] = {int(step): loss for step, loss in known["reported"].items()}
        return cls(**known)


def affected_stages(names: list[str]) -> list[str]:
    """Return the stages that a trial runs: from the first that reads one of the varied blocks on.

    Raises:
        UserError: A block decides the dataset, which all profiles with it share.
    """
    blocks = {f"params:{name.partition('.')[0]}" for name in names}
    for shared in ("ingest", "validate"):
        if f"params:{shared}" in blocks:
            raise UserError(
                f"parameters: {shared}.… makes the dataset, which trials share: give each a profile instead"
            )
    first = next((stage for stage in STAGES if blocks & pipelines[stage].inputs()), None)
    if first is None:
        raise UserError(f"parameters: no stage reads {', '.join(names)}")
    return list(STAGES[STAGES.index(first) :])


def prepare(project: Path, env: str, profile: str, trial: Trial, sweep: str, stages: list[str]) -> tuple[str, Path]:
    """Give a trial a profile with its values, and the data that earlier stages made of the profile it varies.

    Returns:
        Name of the trial's profile, and the configuration folder that has it.
    """
    name, conf = f"{profile}-{sweep}-{trial.id}", project / "data/sweeps" / sweep / trial.id / "conf"
    shutil.rmtree(conf, ignore_errors=True)
    for layer in (BASE, LOCAL):
        shutil.copytree(project / "conf" / layer, conf / layer)
    shutil.copytree(project / "conf" / env, conf / name)
    facts = yaml.safe_load((conf / name / "globals.yml").read_text(encoding="utf-8"))
    (conf / name / "globals.yml").write_text(yaml.safe_dump(facts | {"profile": name}), encoding="utf-8")
    # Also over a person's own values, which go before the profile's.
    for layer in (name, LOCAL):
        _set_values(conf / layer / "parameters.yml", trial.values)
    own = conf / LOCAL / "mlflow.yml"
    settings = (yaml.safe_load(own.read_text(encoding="utf-8")) if own.exists() else None) or {}
    naming = {"run_name": f"{profile} {trial.label}", "register_model": None}
    own.write_text(yaml.safe_dump(settings | naming), encoding="utf-8")
    if stages[0] != "sample":
        for layer in _LAYERS:
            _link(project / layer / profile, project / layer / name, tokenized=stages[0] != "tokenize")
    return name, conf


def run(
    project: Path,
    name: str,
    conf: Path,
    stages: list[str],
    environment: Mapping[str, str],
    on_poll: Callable[[dict[int, float]], bool],
) -> str:
    """Run the stages of a trial; one that was cut off before goes on where it was.

    Args:
        project: Root of the project.
        name: Profile of the trial.
        conf: Its configuration folder.
        stages: Names of the stages.
        environment: Environment variables.
        on_poll: Called again and again with `eval_loss` by step; returns whether to end the trial.

    Returns:
        `done`, `pruned` or `failed`.
    """
    command = [sys.executable, "-c", _WITH_THE_SWEEP, "-m", "kedro", "run", "--env", name, "--conf-source", str(conf)]
    command += ["--pipelines", ",".join(stages)]
    with (conf.parent / "run.log").open("ab") as output:
        process = subprocess.Popen(command, cwd=project, env=dict(environment), stdout=output, stderr=output)
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                if on_poll(eval_losses(project / "data/06_models" / name / "scratch")):
                    _end(process)
                    return "pruned"
        except BaseException:
            _end(process)
            raise
    return "done" if process.returncode == 0 else "failed"


def eval_losses(scratch: Path) -> dict[int, float]:
    """Return `eval_loss` by step of the training that goes on in a folder."""
    losses = {}
    for path in scratch.glob("*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            if row.get("eval_loss") is not None:
                losses[row["step"]] = row["eval_loss"]
    return losses


def objective_of(project: Path, name: str, objective: Objective) -> float:
    """Read what was sought from the results of a trial.

    Raises:
        UserError: There is no such number.
    """
    folder, metric = project / "data/08_reporting" / name, objective.metric
    if metric.startswith("train/"):
        curves = pd.read_csv(folder / "training_metrics.csv")
        values = curves.get(metric.removeprefix("train/"), pd.Series(dtype=float)).dropna()
        if len(values):
            best = values.min() if objective.sign > 0 else values.max()
            return float(values.iloc[-1] if metric == "train/loss" else best)
        known = [f"train/{column}" for column in curves.columns]
    else:
        found = numbers(json.loads((folder / "metrics.json").read_text(encoding="utf-8")), "/")
        if metric in found:
            return found[metric]
        known = sorted(found)
    raise UserError(f"objective: there is no '{metric}' among {', '.join(known)}")


def remove(project: Path, name: str) -> None:
    """Delete what a trial has made."""
    for layer in _LAYERS:
        shutil.rmtree(project / layer / name, ignore_errors=True)


def _set_values(path: Path, values: Values) -> None:
    blocks = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}
    for name, value in values.items():
        *keys, last = name.split(".")
        place = blocks
        for key in keys:
            place[key] = place.get(key) or {}
            place = place[key]
        place[last] = value
    path.write_text(yaml.safe_dump(blocks, sort_keys=False), encoding="utf-8")


def _link(source: Path, target: Path, *, tokenized: bool) -> None:
    """Repeat the files of a profile by hard links, which take no space: those that the data stages made."""
    if not source.is_dir():
        return
    left_out = [*_NOT_LINKED, *(() if tokenized else ("base", "tokenized.arrow", "pack_plan.parquet"))]
    ignore = shutil.ignore_patterns(*left_out)
    if not target.exists():
        shutil.copytree(source, target, copy_function=link_file, ignore=ignore)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # it ends its own processes
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

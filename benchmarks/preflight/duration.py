"""How long trainings of the embedded example take, and what the preflight says before, after one that is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).parents[2]
PROFILE = "tiny_qwen3_vl"
# What each training changes of the recorded one: nothing, what is computed, what a step has, how many there are.
# The fixed cost of a step is part of the recorded speed, so packs of another length are foretold worst.
CHANGES: tuple[dict[str, dict[str, Any]], ...] = (
    {},
    {"train": {"freeze_modules": ["visual"]}},
    {"sample": {"video_max_frames": 2}},
    {"batching": {"num_train_epochs": 2}},
    {"batching": {"packing_length": 2048}},
)
_RECORDED = ("train_result.json", "training_metrics.csv")


def rows() -> Iterator[dict[str, Any]]:
    """Run the example once; then ask by that record and train, with one change at a time.

    Yields:
        For each change: seconds of all its steps, expected and measured, the relative error, and whether the answer
        calls itself a rough guess.
    """
    with TemporaryDirectory() as name:
        project = Path(name, "project")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
        _kedro(project, "ingest,validate,sample,tokenize,train")
        recorded = {path: path.read_bytes() for path in (_one(project, file) for file in _RECORDED)}
        for number, change in enumerate(CHANGES):
            parameters = {"train": {"seed": number + 1}} | change  # the same training again would have nothing to do
            (project / "conf" / "local" / "parameters.yml").write_text(yaml.safe_dump(parameters), encoding="utf-8")
            _kedro(project, "sample,tokenize")
            for path, content in recorded.items():
                path.write_bytes(content)
            _kedro(project, "preflight")  # in one run with these it is asked first, without their plan
            time = json.loads(_one(project, "preflight.json").read_text())["time"]
            _kedro(project, "train")
            steps = pd.read_csv(_one(project, "training_metrics.csv"))
            measured = float((steps["tokens"] / steps["tokens_per_second"]).sum())
            row = {"change": json.dumps(change), "expected_s": time["seconds"], "measured_s": measured}
            row |= {"error": time["seconds"] / measured - 1, "rough": "rough" in time["source"]}
            print(row, flush=True)
            yield row


def _one(project: Path, name: str) -> Path:
    (path,) = project.glob(f"data/*/{PROFILE}/{name}")
    return path


def _kedro(project: Path, pipelines: str) -> None:
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", pipelines]
    environment = os.environ | {"PYTHONPATH": str(project / "src")}
    subprocess.run(command, cwd=project, env=environment, check=True)

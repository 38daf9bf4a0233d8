"""The workflow in docs/ci is one, and what its steps run works in a repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kedro_project import REPOSITORY

METRICS = Path("data/08_reporting/tiny_qwen3_vl/metrics.json")


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    """The named steps of the workflow; `on` is a word to this loader."""
    workflow = yaml.load((REPOSITORY / "docs/ci/train.yml").read_text(), yaml.BaseLoader)
    assert set(workflow["on"]) == {"pull_request", "workflow_dispatch", "schedule"}
    (job,) = workflow["jobs"].values()
    return {step["name"]: step for step in job["steps"] if "name" in step}


def test_its_commands_are_those_of_this_project(steps: dict[str, dict[str, Any]]) -> None:
    lines = {name: step["run"] for name, step in steps.items() if "run" in step}
    assert list(lines) == ["install", "pull", "reproduce", "push", "report", "comment"]
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert re.match(r"make (\w+)", lines["install"])[1] in targets
    for name in ("pull", "push"):
        command = lines[name].partition("#")[0].split()
        done = subprocess.run(["dvc", *command[1:], "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert all(option in done.stdout for option in command[2:])


def test_a_change_trains_what_it_touches_and_is_reported(trained: Path, steps: dict[str, dict[str, Any]]) -> None:
    parameters = trained / "conf/tiny_qwen3_vl/parameters.yml"
    blocks = yaml.safe_load(parameters.read_text())
    blocks["evaluate"]["max_new_tokens"] = 3
    parameters.write_text(yaml.safe_dump(blocks))
    before = json.loads((trained / METRICS).read_text())

    def step(name: str) -> subprocess.CompletedProcess[str]:
        line = ["bash", "-e", "-c", steps[name]["run"]]
        return subprocess.run(line, cwd=trained, env=os.environ | {"BASE": "HEAD"}, capture_output=True, text=True)

    done = step("reproduce")
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"Running stage '(\w+)@", done.stdout)
    assert ran == ["evaluate"]
    # As a gate sees it: what became worse is in the report.
    changed = json.loads((trained / METRICS).read_text())
    changed["trained"]["overall"]["exact_match"] = before["trained"]["overall"]["exact_match"] - 0.5
    (trained / METRICS).write_text(json.dumps(changed))
    assert step("report").returncode == 0
    report = (trained / "report.md").read_text()
    assert re.search(r"\| .*metrics\.json +\| trained\.overall\.exact_match +\|.*\| -0\.5 +\|", report), report
    assert re.search(r"\| .*parameters\.yml +\| evaluate\.max_new_tokens +\| 8 +\| 3 +\|", report), report

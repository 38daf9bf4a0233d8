"""The Makefile, with commands that only say that they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# Notes its call, and makes a virtual environment of commands like itself when asked for one.
COMMAND = """
import sys
from pathlib import Path

command, *arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(Path(command).name, *arguments, file=log)
if "venv" in arguments:
    folder = Path(arguments[-1]) / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "pip", "uv", "kedro", "mlflow", "dvc"):
        (folder / name).write_bytes(Path(command).read_bytes())
        (folder / name).chmod(0o755)
"""


class Folder:
    """A copy of what `make` reads, and the calls made so far. There are spaces in all paths."""

    def __init__(self, path: Path) -> None:
        self.path = path / "my clone"
        self.path.mkdir()
        self.commands = path / "some commands"
        self.commands.mkdir()
        self.log = path / "calls"
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, self.path)
        shutil.copytree(ROOT / "conf", self.path / "conf", ignore=shutil.ignore_patterns("local"))
        for name in ("make", "sh", "awk", "mkdir", "chmod", "touch", "test", "rm", "find"):
            (self.commands / name).symlink_to(shutil.which(name))

    def add_command(self, name: str) -> None:
        """Add a command that only notes its call."""
        script = self.commands / "command.py"
        script.write_text(COMMAND.format(log=str(self.log)))
        # Not as the interpreter of the script itself: its path may have spaces.
        (self.commands / name).write_text(f"#!/bin/sh\nexec '{sys.executable}' '{script}' \"$0\" \"$@\"\n")
        (self.commands / name).chmod(0o755)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.commands), "HOME": os.environ.get("HOME", "/"), **variables}
        return subprocess.run(
            ["make", *arguments], cwd=self.path, env=environment, capture_output=True, text=True, check=False
        )

    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


INSTALL = [
    "uv pip install --quiet --compile-bytecode --python .venv/bin/python --requirement requirements.lock",
    "uv pip install --quiet --python .venv/bin/python --no-deps --editable .",
]


def test_help_describes_every_target(folder: Folder) -> None:
    described = [line.split()[1] for line in folder.make().stdout.splitlines()]
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert described == phony.split()[1:]


def test_run_installs_once_and_says_so(folder: Folder) -> None:
    folder.add_command("uv")
    first = folder.make("run")
    assert first.returncode == 0, first.stderr
    assert "installing requirements.lock into .venv" in first.stdout
    assert folder.calls() == ["uv venv --quiet --python >=3.11,<3.14 .venv", *INSTALL, "kedro run"]
    second = folder.make("run")
    assert "installing" not in second.stdout
    assert folder.calls() == ["kedro run"]


@pytest.mark.parametrize(("profile", "dataset"), [("", "digits"), ("qwen3_vl_8b", "my_dataset")])
def test_run_ends_with_the_places_of_all_pages(folder: Folder, profile: str, dataset: str) -> None:
    folder.add_command("uv")
    name = profile or "tiny_qwen3_vl"
    lines = folder.make("run", *([f"PROFILE={profile}"] if profile else [])).stdout.splitlines()
    assert lines[-6:-2] == [
        f"==> data:   data/08_reporting/{dataset}/validation.html",
        f"==> labels: data/08_reporting/{name}/label_preview.html",
        f"==> report: data/08_reporting/{name}/report.html",
        f"==> model:  data/06_models/{name}/trained",
    ]
    assert lines[-2] == "==> 'make compare' puts two or more trainings on data/08_reporting/compare.html"


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_a_changed_requirement_is_installed_into_the_same_environment(folder: Folder, name: str) -> None:
    folder.add_command("uv")
    folder.make("setup")
    folder.calls()
    later = time.time() + 5
    os.utime(folder.path / name, (later, later))
    folder.make("setup")
    assert folder.calls() == INSTALL


def test_another_python_gets_an_environment_of_its_own(folder: Folder) -> None:
    folder.add_command("uv")
    folder.make("setup", "PYTHON=3.13", "VENV=.venv-3.13")
    made, *installed = folder.calls()
    assert made == "uv venv --quiet --python 3.13 .venv-3.13"
    assert installed == [call.replace(".venv/", ".venv-3.13/") for call in INSTALL]
    assert not (folder.path / ".venv").exists()


def test_an_interrupted_installation_is_made_again(folder: Folder) -> None:
    folder.add_command("uv")
    folder.make("setup")
    (folder.path / ".venv" / ".up-to-date").unlink()
    folder.calls()
    folder.make("setup")
    assert folder.calls() == INSTALL


def test_a_machine_without_uv_gets_a_private_one(folder: Folder) -> None:
    folder.add_command("python3")
    assert folder.make("setup").returncode == 0
    assert folder.calls() == [
        "python3 -m venv .uv",
        "pip install --quiet --disable-pip-version-check uv",
        "uv venv --quiet --python >=3.11,<3.14 .venv",
        *INSTALL,
    ]
    folder.make("run")
    assert folder.calls() == ["kedro run"]


def test_a_machine_with_neither_is_told_what_to_install(folder: Folder) -> None:
    done = folder.make("setup")
    assert done.returncode != 0
    assert "Install uv (https://docs.astral.sh/uv) or the venv module of python3" in done.stderr


def test_variables_reach_the_commands(folder: Folder) -> None:
    folder.add_command("uv")
    folder.make("setup")
    folder.calls()
    folder.make("run", "PROFILE=tiny_qwen2_5_vl")
    folder.make("ui", "PORT=5001")
    folder.make("ui", MLFLOW_TRACKING_URI="https://mlflow.example.org")
    folder.make("repro")
    folder.make("compare")
    folder.make("compare", "RUNS=tiny_qwen3_vl,  tiny_qwen2_5_vl 0a1b")
    ui = "mlflow ui --workers 1 --host 127.0.0.1 --port"
    assert folder.calls() == [
        "kedro run --env tiny_qwen2_5_vl",
        "python -m qvl_pipeline.tracking.mlflow.view 5001",
        f"{ui} 5001 --backend-store-uri sqlite:///mlflow.db",
        "python -m qvl_pipeline.tracking.mlflow.view 5000",
        f"{ui} 5000 --backend-store-uri https://mlflow.example.org",
        "dvc repro",
        "kedro run --pipelines compare",
        "kedro run --pipelines compare --params compare.runs=tiny_qwen3_vl+tiny_qwen2_5_vl+0a1b",
    ]


def test_clean_keeps_data_and_runs(folder: Folder) -> None:
    for name in (
        "data/06_models/tiny_qwen3_vl/model",
        "mlflow.db",
        ".venv/bin/python",
        "src/__pycache__/a.pyc",
        ".coverage.1",
    ):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("")
    folder.make("clean")
    left = {path.name for path in folder.path.rglob("*") if path.is_file() and "conf" not in path.parts}
    assert left == {"Makefile", "requirements.lock", "pyproject.toml", "model", "mlflow.db"}

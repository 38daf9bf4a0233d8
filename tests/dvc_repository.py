"""A git and DVC repository of this project in a temporary folder, with a dataset that is trained on in seconds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.kedro_project import REPOSITORY, make_project

# 28 samples to train on, two optimizer steps on one process.
SMALL: dict[str, dict[str, Any]] = {
    "ingest": {"demo": {"train_samples": 28, "eval_samples": 7}},
    # Of so few rows, those that are planted to be found are a large share.
    "validate": {"max_reject_fraction": 1.0},
    # Every decoding process imports its libraries anew.
    "sample": {"num_workers": 1},
    "batching": {"num_train_epochs": 1, "data_parallel_size": 1},
    "train": {"logging_steps": 1, "save_steps": 0, "keep_checkpoints": [{"every": 1}]},
}


def make_repository(folder: Path) -> Path:
    """Create the repository, everything committed; its package is this one."""
    make_project(folder)
    (folder / "conf" / "local" / ".gitkeep").touch()
    for name in (".gitignore", ".dvcignore", "dvc.yaml", "params.yaml", "requirements.lock"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    (folder / "src" / "qvl_pipeline").symlink_to(REPOSITORY / "src" / "qvl_pipeline")
    path = folder / "conf" / "tiny_qwen3_vl" / "parameters.yml"
    blocks = yaml.safe_load(path.read_text())
    for block, values in SMALL.items():
        for key, value in values.items():
            blocks[block][key] = blocks[block][key] | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(blocks))
    command(folder, "git init --quiet")
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    """Commit all that git does not ignore."""
    command(folder, "git add .")
    command(folder, "git -c user.name=a -c user.email=a@example.org commit --quiet --message all")


def command(folder: Path, line: str) -> str:
    """Run a command, split at spaces, in a folder; return what it printed."""
    done = subprocess.run(line.split(" "), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout

"""Which code made a run: its commit, and the DVC stage that started it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# What decides the result of a run. DVC rewrites dvc.lock between two stages, which must not make the second one dirty.
# Parameters are recorded as they were used: `dvc exp run -S` writes them into their file, and the code is the commit's.
CODE_PATHS = ("src", "conf", "dvc.yaml", "pyproject.toml", ":(exclude,glob)conf/*/parameters*.yml")
DVC_VARIABLES = {"dvc_stage": "DVC_STAGE", "dvc_experiment": "DVC_EXP_NAME"}


def git_tags(project: Path) -> dict[str, str]:
    """Return the tags `mlflow.source.git.commit` and `git_dirty`; none outside of a git repository."""
    commit = _git(project, "rev-parse", "HEAD")
    changes = _git(project, "status", "--porcelain", "--", *CODE_PATHS)
    if commit is None or changes is None:
        return {}
    # In the index alone (DVC puts there what a stage depends on) is neither in the commit nor on disk.
    changed = [line for line in changes.splitlines() if not line.startswith("AD")]
    return {"mlflow.source.git.commit": commit, "git_dirty": str(bool(changed)).lower()}


def _git(project: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", project, *arguments], capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def dvc_tags() -> dict[str, str]:
    """Return the tags `dvc_stage` and `dvc_experiment`, as far as DVC runs this process."""
    return {tag: os.environ[name] for tag, name in DVC_VARIABLES.items() if os.environ.get(name)}

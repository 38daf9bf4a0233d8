"""Where a run comes from: the commit of the code, the DVC stage, the content of the data."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What decides the result of a run. DVC rewrites dvc.lock between two stages, which must not make the second one dirty.
CODE_PATHS = ("src", "conf", "dvc.yaml", "pyproject.toml")
DVC_VARIABLES = {"dvc_stage": "DVC_STAGE", "dvc_experiment": "DVC_EXP_NAME"}
# Above this size a digest covers file names and sizes only: hashing a base model would delay every start by minutes.
MAX_HASHED_BYTES = 2**30
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|key|credentials?)$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
# As in presigned URLs, and in `--params`.
_SECRET_ARGUMENT = re.compile(r"(?i)((?:token|secret|password|credential|signature|api_?key|access_?key)=)[^&\s,;'\"]+")
# Shorter values of secret variables are settings, and would be found in everything.
_SHORTEST_SECRET = 8


def git_tags(project: Path) -> dict[str, str]:
    """Return the tags `mlflow.source.git.commit` and `git_dirty`; none outside of a git repository."""
    commit = _git(project, "rev-parse", "HEAD")
    changes = _git(project, "status", "--porcelain", "--", *CODE_PATHS)
    if commit is None or changes is None:
        return {}
    return {"mlflow.source.git.commit": commit, "git_dirty": str(bool(changes)).lower()}


def _git(project: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", project, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def dvc_tags() -> dict[str, str]:
    """Return the tags `dvc_stage` and `dvc_experiment`, as far as DVC runs this process."""
    return {tag: os.environ[name] for tag, name in DVC_VARIABLES.items() if os.environ.get(name)}


def content_digest(path: Path) -> str:
    """Return a digest of a file or folder in 36 characters, MLflow's limit.

    It starts with `sha:` when it covers the content, and with `len:` when only names and sizes (see
    `MAX_HASHED_BYTES`).
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    whole = sum(file.stat().st_size for file in files) <= MAX_HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        if whole:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{'sha' if whole else 'len'}:{digest.hexdigest()[:32]}"


def without_secrets(values: Any) -> Any:
    """Return `values` with secrets replaced by `***`.

    Secrets are logins in URLs, the values of keys and arguments that name one, and the values of environment variables
    that do (`HF_TOKEN`, `WANDB_API_KEY`), wherever they occur.
    """
    if isinstance(values, dict):
        return {key: "***" if _SECRET_KEY.search(str(key)) else without_secrets(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_secrets(value) for value in values]
    return _masked(values) if isinstance(values, str) else values


def _masked(text: str) -> str:
    text = _SECRET_ARGUMENT.sub(r"\1***", _URL_LOGIN.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_KEY.search(name):
            text = text.replace(value, "***")
    return text


def flattened(values: dict[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries with their keys joined by `separator`."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}{separator}{inner}", leaf) for inner, leaf in flattened(value, separator))
        else:
            yield str(key), value


def numbers(values: dict[str, Any], separator: str) -> dict[str, float]:
    """Return the numbers among the leaves of nested dictionaries, by their joined keys."""
    leaves = flattened(values, separator)
    return {key: value for key, value in leaves if isinstance(value, int | float) and not isinstance(value, bool)}

"""The code of a run that no commit has: recorded with the run, so that it can be repeated."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from qvl_pipeline.secrets import file_without_secrets

PATCH = "uncommitted.patch"
# Tag of a run whose patch held secrets.
MASKED = "uncommitted_masked"
# Of the configuration only the catalogs: parameters and profile are recorded as they were used, and other files may
# hold credentials.
_PATHS = ("src", "pyproject.toml", ":(glob)conf/*/catalog*.yml")


def uncommitted(project: Path) -> tuple[str, bool]:
    """Return the difference between the code and the commit it stands on, new files included, for `git apply`.

    Returns:
        The patch, in which secrets are masked; and whether there were any: it is then not the code that ran.

    Raises:
        OSError: Git refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"
        inside = _git(project, "rev-parse", "--path-format=absolute", "--git-path", "index").strip()
        shutil.copy(inside, index)
        # New files have to be added to be compared: to a copy, so that what is staged stays as it is.
        paths = [path for path in _PATHS if path.startswith(":") or (project / path).exists()]
        _git(project, "add", "--all", "--", *paths, index=index)
        patch = _git(project, "diff", "--cached", "--binary", "--no-ext-diff", "HEAD", "--", *paths, index=index)
    masked = file_without_secrets(patch)
    return masked, masked != patch


def _git(project: Path, *arguments: str, index: Path | None = None) -> str:
    environment = os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {})
    command = ["git", "-C", str(project), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise OSError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout

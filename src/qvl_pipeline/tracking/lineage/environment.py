"""The software that a run has, as text: what `pip install` would need to make it again."""

from __future__ import annotations

import os
import platform
import runpy
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path


def environment_freeze() -> str:
    """Return Python, platform and CUDA as comments, and the name and version of every installed package."""
    lines = {f"{package.name}=={package.version}" for package in distributions() if package.name}
    about = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": _cuda() or "none, torch is built for CPUs",
        "cpus": str(os.cpu_count()),
    }
    return "\n".join([*(f"# {name}: {value}" for name, value in about.items()), *sorted(lines, key=str.lower), ""])


def _cuda() -> str | None:
    """Return the version of CUDA that torch is built for, without importing torch, which takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")

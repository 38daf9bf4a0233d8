"""Whether what is installed is what `requirements.lock` says: DVC sees that file, and not the environment."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

LOCK = Path("requirements.lock")
# These decide numbers; builds of one version for different GPUs have different endings.
DECISIVE = ("av", "numpy", "pillow", "tokenizers", "torch", "torchvision", "transformers")


def installed_otherwise(lock: Path = LOCK) -> dict[str, tuple[str, str]]:
    """Return the decisive packages of which another version is installed: the locked and the installed one."""
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    wanted = [Requirement(line) for line in lines if line.partition("==")[0] in DECISIVE]
    # It is for several Pythons and platforms.
    here = [each for each in wanted if each.marker is None or each.marker.evaluate()]
    locked = {each.name: next(iter(each.specifier)).version for each in here}
    found = {}
    for name in sorted(locked):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed.partition("+")[0] != locked[name].partition("+")[0]:
            found[name] = (locked[name], installed)
    return found

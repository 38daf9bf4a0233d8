"""Versions that are installed, held against those that are known to be bad."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

_TABLE = Path(__file__).with_name("known_bad.toml")


def known_bad() -> list[dict[str, str]]:
    """Read the table: `package`, `versions`, `what` goes wrong, whether that is so `here`, and the upstream `issue`."""
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))["versions"]


def bad_versions() -> list[dict[str, str]]:
    """Return the entries that the installed versions are in, each with `installed`."""
    found = []
    for entry in known_bad():
        try:
            installed = version(entry["package"])
        except PackageNotFoundError:
            continue
        if SpecifierSet(entry["versions"]).contains(installed.split("+")[0], prereleases=True):
            found.append({**entry, "installed": installed})
    return found

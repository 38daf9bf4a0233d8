"""Which file, or the command line, a parameter comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]

COMMAND_LINE, DEFAULT = "--params", "default"
# As Kedro finds them in a folder.
_PATTERNS = ("parameters*", "parameters*/**/*", "**/parameters*")
_ENDINGS = {".yml", ".yaml", ".json"}


class Origins:
    """The values that each layer of parameters states itself."""

    def __init__(self, runtime: dict[str, Any], folders: Sequence[Path]) -> None:
        """Read the files of all layers.

        Args:
            runtime: Parameters given on the command line, by `--params`.
            folders: Configuration folders, the one that takes precedence first.
        """
        self._folders = folders
        self._layers: list[tuple[str, Any]] = [(COMMAND_LINE, runtime)]
        for folder in folders:
            found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.suffix in _ENDINGS}
            self._layers += [(_shown(path, folder), yaml.safe_load(path.read_text("utf-8"))) for path in sorted(found)]

    def of(self, key: Key) -> str:
        """Return where a value is set: a file from `conf` on, `--params`, or `default`."""
        return next((layer for layer, values in self._layers if _has(values, key)), DEFAULT)

    def nearest(self, key: Key) -> str:
        """Return where a value is set, else where what it belongs to is, else where it could be."""
        found = (self.of(key[:length]) for length in range(len(key), 0, -1))
        advice = f"add it to a parameters file in {' or '.join(_shown(folder, folder) for folder in self._folders)}"
        return next((origin for origin in found if origin != DEFAULT), advice)


def _shown(path: Path, folder: Path) -> str:
    """Name a path in a configuration folder from `conf` on."""
    return path.relative_to(folder.parents[1]).as_posix()


def _has(values: Any, key: Key) -> bool:
    for part in key:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if not inside:
            return False
        values = values[part]
    return True

"""Files and folders that a node writes itself: loaded as a path, saved by a writer function, published atomically."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

Writer = Callable[[Path], Any]


class _WrittenDataset(AbstractDataset[Writer, Path]):
    """A path on disk whose content is written by the function that a node returns.

    The writer gets a temporary sibling, which replaces the old content only when the writer has returned: a run that
    is killed leaves the previous content, never half of a new one.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Create the dataset.

        Args:
            filepath: Path of the file or folder.
            metadata: Free-form metadata, read by Kedro plugins.
        """
        self._filepath = Path(filepath)
        self.metadata = metadata

    def _exists(self) -> bool:
        return self._filepath.exists()

    def load(self) -> Path:
        """Return the path.

        Raises:
            DatasetError: Nothing was written there yet.
        """
        if not self._exists():
            raise DatasetError(f"{self._filepath} does not exist")
        return self._filepath

    def save(self, data: Writer) -> None:
        """Let `data` write a temporary sibling, then move it into place."""
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        partial = self._filepath.with_name(f".{self._filepath.name}.partial")
        _remove(partial)
        try:
            data(partial)
            _remove(self._filepath)
            partial.replace(self._filepath)
        finally:
            _remove(partial)

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class FileDataset(_WrittenDataset):
    """One file; the writer is called with the path of a file to create."""


class FolderDataset(_WrittenDataset):
    """One folder; the writer is called with the path of a folder to create."""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Files and folders that a node writes itself: loaded as a path, saved by a writer function, published atomically."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from qvl_pipeline.storage.room import room_for

Writer = Callable[[Path], Any]


class _WrittenDataset(AbstractDataset[Writer, Path]):
    """A path on disk whose content is written by the function that a node returns.

    The writer gets a temporary sibling, which takes the place of the old content when the writer has returned: a run
    that is killed leaves old or new content, or for a moment none, but never half of one.
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
        """Let `data` write a temporary sibling, then move it into place.

        Raises:
            NoRoomError: There is no room for it.
        """
        partial, old = (self._filepath.with_name(f".{self._filepath.name}.{end}") for end in ("partial", "old"))
        _remove(partial)
        try:
            with room_for(self._filepath, written=partial):
                self._filepath.parent.mkdir(parents=True, exist_ok=True)
                data(partial)
        except BaseException:
            _remove(partial)
            raise
        # A folder cannot be replaced in one step. Between these two it is missing as a whole, never half there.
        _remove(old)
        if self._exists():
            self._filepath.rename(old)
        partial.rename(self._filepath)
        _remove(old)

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

"""Files and folders that a node writes itself: loaded as a path, saved by a writer function, published atomically."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from qvl_pipeline.storage.room import room_for

Writer = Callable[[Path], Any]

logger = logging.getLogger(__name__)


class _WrittenDataset(AbstractDataset[Writer, Path]):
    """A path on disk whose content is written by the function that a node returns.

    The writer gets a temporary sibling, which takes the place of the old content when the writer has returned. A folder
    cannot be replaced in one step: a run that is killed between the two leaves old and new content beside an empty
    place, and whoever looks for it next puts the new one there.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Create the dataset.

        Args:
            filepath: Path of the file or folder.
            metadata: Free-form metadata, read by Kedro plugins.
        """
        self._filepath = Path(filepath)
        self._partial, self._old = (
            self._filepath.with_name(f".{self._filepath.name}.{end}") for end in ("partial", "old")
        )
        self.metadata = metadata

    def _exists(self) -> bool:
        if not self._filepath.exists() and self._old.exists() and self._partial.exists():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                self._partial.rename(self._filepath)  # whole, or the old content would be in its place still
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
            OSError: What a run before left there cannot be deleted.
            NoRoomError: There is no room for it.
        """
        with room_for(self._filepath):
            self._filepath.parent.mkdir(parents=True, exist_ok=True)
        self._exists()  # what is to be replaced is in its place
        for left_behind in (self._partial, self._old):  # before the writer's work, which would be lost
            _remove(left_behind)
        try:
            with room_for(self._filepath, written=self._partial):
                data(self._partial)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(self._partial)
            raise
        if self._filepath.is_dir():
            self._filepath.rename(self._old)
        self._partial.replace(self._filepath)
        try:
            _remove(self._old)
        except OSError as error:
            logger.warning("%s was replaced, but cannot be deleted: remove it by hand (%s)", self._old, error)

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

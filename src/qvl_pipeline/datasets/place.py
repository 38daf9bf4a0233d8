"""A folder that may or may not have something in it yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError


class PlaceDataset(AbstractDataset[None, Path]):
    """Where something is, if it is there: loaded as a path, never missing, never saved."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Create the dataset.

        Args:
            filepath: Path of the folder.
            metadata: Free-form metadata, read by Kedro plugins.
        """
        self._filepath = Path(filepath)
        self.metadata = metadata

    def _exists(self) -> bool:
        return True

    def load(self) -> Path:
        """Return the path."""
        return self._filepath

    def save(self, data: None) -> NoReturn:
        """Refuse.

        Raises:
            DatasetError: Always: others write what is there.
        """
        raise DatasetError(f"{self._filepath} is a place to look at, and nothing is saved there")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

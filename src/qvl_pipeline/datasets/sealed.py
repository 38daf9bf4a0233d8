"""JSON objects with a digest, by which a reader notices that they are not what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset, DatasetError

from qvl_pipeline.datasets.another import OfAnotherNode
from qvl_pipeline.storage.digests import read_sealed, sealed
from qvl_pipeline.storage.whole import write_whole

if TYPE_CHECKING:
    from kedro_datasets._typing import JSONPreview


class JsonDataset(AbstractDataset[dict[str, Any], dict[str, Any]]):
    """A JSON object, which appears whole. Its digest is a key in the file, and no key of what is loaded."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        """Create the dataset.

        Args:
            filepath: Path of the file.
            metadata: Free-form metadata, read by Kedro plugins.
        """
        self._filepath = Path(filepath)
        self.metadata = metadata
        self._of_another: dict[str, Any] | None = None

    def load(self) -> dict[str, Any]:
        """Load the object.

        Raises:
            DamagedError: The file is not what was written.
        """
        if self._of_another is not None:
            return self._of_another
        if not self._exists():
            raise DatasetError(f"{self._filepath} does not exist")
        return read_sealed(self._filepath)

    def save(self, data: dict[str, Any]) -> None:
        """Write the object with its digest; one that another node of the job writes is kept in memory.

        Raises:
            NoRoomError: There is no room for it.
        """
        if isinstance(data, OfAnotherNode):
            self._of_another = dict(data)
            return
        write_whole(self._filepath, json.dumps(sealed(data), indent=4))

    def preview(self) -> JSONPreview:
        """Return the object, for Kedro-Viz."""
        return json.dumps(self.load())

    def _exists(self) -> bool:
        return self._of_another is not None or self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

"""A table with exactly the columns and types of its contract, written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from kedro.io import AbstractDataset, DatasetError
from kedro.utils import load_obj

from qvl_pipeline.storage.tables import ATTRS, damage_named, open_table, read_table, write_table
from qvl_pipeline.storage.whole import whole

if TYPE_CHECKING:
    from kedro_datasets._typing import TablePreview


class TableDataset(AbstractDataset[pd.DataFrame | Callable[[Path], Any], pd.DataFrame | pq.ParquetFile]):
    """Parquet with a given Arrow schema, and the `attrs` of the data frame.

    Plain pandas would write a column as type `null` when no row has a value in it, and write over the old file. A table
    that is too large for a data frame is saved as a function that is called with the path of a file to write, and
    loaded as a `pyarrow.parquet.ParquetFile`, of which whoever gets it reads as much at a time as it likes.
    """

    def __init__(
        self,
        *,
        filepath: str,
        schema: str | None = None,
        streamed: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Create the dataset.

        Args:
            filepath: Path of the Parquet file.
            schema: Dotted name of a `pyarrow.Schema`; without, the columns are those of the data frame.
            streamed: Load the table without reading it into memory.
            metadata: Free-form metadata, read by Kedro plugins.
        """
        self._filepath = Path(filepath)
        self._schema = schema
        self._streamed = streamed
        self.metadata = metadata

    def load(self) -> pd.DataFrame | pq.ParquetFile:
        """Load the table; integers stay integers where there are nulls.

        Raises:
            DamagedError: The file is not what was written. Of a streamed table, only its end is looked at; its batches
                raise this as they are read.
        """
        if not self._exists():
            raise DatasetError(f"{self._filepath} does not exist")
        advice = "make it again, by the pipeline that writes it"
        if self._streamed:
            with damage_named(self._filepath, advice):
                return open_table(self._filepath)
        schema = load_obj(self._schema) if self._schema else None
        table = read_table(self._filepath, schema, advice=advice)
        if schema is None:
            return table.to_pandas()
        frame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
        frame.attrs = json.loads((table.schema.metadata or {}).get(ATTRS, b"{}"))
        return frame

    def save(self, data: pd.DataFrame | Callable[[Path], Any]) -> None:
        """Write a temporary sibling, then move it into place.

        Raises:
            DatasetError: The table has other columns than the schema, or values that do not fit their types.
            NoRoomError: There is no room for it.
        """
        schema = load_obj(self._schema) if self._schema else None
        if isinstance(data, pd.DataFrame):
            if schema is not None and data.empty:  # its columns have whatever types pandas gives to none
                data = data.astype(object)
            table = pa.Table.from_pandas(data, schema=schema, preserve_index=False)
            if schema is not None:
                # Without pandas' own metadata, with the versions of its libraries: the bytes are the data's alone.
                metadata = {ATTRS: json.dumps(data.attrs, sort_keys=True)} if data.attrs else None
                table = table.replace_schema_metadata(metadata)
            with whole(self._filepath, table.nbytes) as partial:
                write_table(table, partial)
            return
        with whole(self._filepath) as partial:
            data(partial)
            if (found := pq.read_schema(partial)) != schema:
                raise DatasetError(f"{self._filepath} was written with the columns {found.names}, not {schema.names}")

    def preview(self, nrows: int = 10) -> TablePreview:
        """Return the first rows for Kedro-Viz, read without the rest; values that are lists are shown as text."""
        with pq.ParquetFile(self._filepath) as file:
            rows = next((batch.to_pylist() for batch in file.iter_batches(nrows)), [])
            columns = file.schema_arrow.names
        data = [[str(value) if isinstance(value, list) else value for value in row.values()] for row in rows]
        return {"index": list(range(len(data))), "columns": columns, "data": data}

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "schema": self._schema}

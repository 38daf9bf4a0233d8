"""Random access to the rows of `tokenized_samples`, memory-mapped; shared by planning, training and evaluation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qvl_pipeline.storage.batches import CheckedBatches


class TokenizedSamples:
    """The rows of a `tokenized_samples` file (Arrow IPC file format), read from a memory map.

    Opening costs the file's footer, a row costs the record batch it lies in, which is checked when it is first read.
    Objects can be pickled: a loader process maps the file anew.
    """

    def __init__(self, path: Path) -> None:
        """Map the file.

        Args:
            path: File written by the `tokenize` stage.

        Raises:
            FileNotFoundError: The file is missing.
            DamagedError: It is no whole Arrow file. Every method raises this for what is not what was written.
        """
        self.path = Path(path)
        self._batches = CheckedBatches(self.path, "run the pipeline 'tokenize' again")
        self._starts = list(accumulate((batch.num_rows for batch in self._batches.unchecked), initial=0))

    def __len__(self) -> int:
        """Number of samples."""
        return self._starts[-1]

    def __reduce__(self) -> tuple[type[TokenizedSamples], tuple[Path]]:
        """Pickle as the path."""
        return TokenizedSamples, (self.path,)

    def row(self, index: int) -> dict[str, Any]:
        """Read one sample.

        Args:
            index: Row number, 0-based.

        Returns:
            The columns of the contract as plain Python values, but for `input_ids` (int32 `[T]`) and `label_spans`
            (int32 `[S, 2]`, half-open).

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}: it has {len(self)} rows")
        number = bisect_right(self._starts, index) - 1
        batch, row = self._batches.batch(number), index - self._starts[number]
        spans = batch.column("label_spans")[row].values
        special = {
            "input_ids": _int32(batch.column("input_ids")[row].values),
            "label_spans": np.stack([_int32(spans.field("start")), _int32(spans.field("end"))], axis=1),
        }
        plain = (name for name in batch.schema.names if name not in special)
        return {name: batch.column(name)[row].as_py() for name in plain} | special

    @property
    def num_shards(self) -> int:
        """Number of record batches: the stretches of rows that are read together."""
        return len(self._batches)

    def shard(self, number: int, names: Sequence[str]) -> tuple[int, list[tuple[Any, ...]]]:
        """Read some columns of one record batch.

        Args:
            number: Which, from 0.
            names: Columns wanted.

        Returns:
            The number of its first row, and the values of the columns, row by row.
        """
        batch = self._batches.batch(number, names).select(list(names))
        return self._starts[number], list(zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Read whole columns, leaving the others untouched on disk.

        Args:
            names: Columns wanted.

        Returns:
            A table of these columns, in row order.
        """
        schema = pa.schema([self._batches.schema.field(name) for name in names])
        numbers = range(len(self._batches))
        return pa.Table.from_batches([self._batches.batch(n, names).select(names) for n in numbers], schema=schema)


def _int32(array: pa.Int32Array) -> np.ndarray:
    """Copy the values: torch does not share memory that it must not write to.

    Arrow's own `to_numpy` imports pandas where it is installed, which training processes do without.
    """
    return np.frombuffer(array.buffers()[1], dtype=np.int32)[array.offset : array.offset + len(array)].copy()

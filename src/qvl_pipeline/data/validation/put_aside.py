"""Which columns of the sources nothing reads: a person is to see what was put aside."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import orjson
import pyarrow as pa

_NOTHING = (None, "", [], {})


def count_put_aside(batches: Iterable[pa.RecordBatch]) -> dict[str, dict[str, int]]:
    """Count the columns that went to `metadata`.

    Args:
        batches: Columns `source` and `metadata` of `samples`.

    Returns:
        By source, how many of its samples have a value in each such column, the most frequent first; sources without
        any are left out.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for batch in batches:
        for source, metadata in zip(*(batch[name].to_pylist() for name in ("source", "metadata")), strict=True):
            if metadata not in (None, "{}"):
                columns = orjson.loads(metadata)
                found[source].update(column for column, value in columns.items() if value not in _NOTHING)
    return {
        source: dict(sorted(columns.items(), key=lambda column: (-column[1], column[0])))
        for source, columns in sorted(found.items())
        if columns
    }

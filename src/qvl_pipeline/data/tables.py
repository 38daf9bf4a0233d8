"""The tables that the first stages hand over, with their exact columns (see docs/architecture.md)."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

# Task of samples whose rows name none: the evaluation goes by their answers.
AUTO = "auto"

MEDIA = pa.list_(
    pa.struct([("type", pa.string()), ("path", pa.string()), ("start", pa.float64()), ("end", pa.float64())])
)

SAMPLES = pa.schema(
    {
        "sample_id": pa.string(),
        "source": pa.string(),
        "row": pa.int64(),
        "split": pa.string(),
        "kind": pa.string(),
        "task": pa.string(),
        "answer": pa.string(),
        "messages": pa.string(),
        "media": MEDIA,
        "metadata": pa.string(),
    }
)

REJECTS = pa.schema({"source": pa.string(), "row": pa.int64(), "rule": pa.string(), "detail": pa.string()})

QUARANTINE = pa.schema(
    {
        "sample_id": pa.string(),
        "source": pa.string(),
        "row": pa.int64(),
        "split": pa.string(),
        "rule": pa.string(),
        "detail": pa.string(),
    }
)

# Rules that a valid sample breaks, but only with a warning.
WARNINGS = QUARANTINE

MEDIA_INDEX = pa.schema(
    {
        "path": pa.string(),
        "type": pa.string(),
        "rule": pa.string(),
        "detail": pa.string(),
        "content_hash": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "n_frames": pa.int64(),
        "fps": pa.float64(),
        "duration_s": pa.float64(),
        "codec": pa.string(),
        "sample_rate": pa.int64(),
        "channels": pa.int64(),
    }
)

PACK_PLAN = pa.schema(
    {
        "step": pa.int32(),
        "pack": pa.int32(),
        "sample_rows": pa.list_(pa.int32()),
        "tokens": pa.int64(),
        "vit_patches": pa.int64(),
        "spectra": pa.int64(),
        "supervised_tokens": pa.int64(),
    }
)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Make the data frame that a catalog entry takes; integers stay integers where there are nulls."""
    return table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def from_frame(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """Take a table out of a catalog entry: exactly the columns and types of `schema`."""
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False)

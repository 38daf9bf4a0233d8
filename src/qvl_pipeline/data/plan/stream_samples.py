"""What an iterable type trains on: raw samples, tokenised only while training reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from qvl_pipeline.storage.tables import table_writer
from qvl_pipeline.tokens.encoding import COPIED, ImageFacts

# Rows that a lane of a stream reads together; a rank holds a few times so many.
ROWS_PER_GROUP = 1024
# Training samples of a stream that are tokenised before training all the same, to be looked at.
PREVIEWED = 1000

_MEDIUM = pa.struct(
    [
        ("type", pa.string()),
        ("path", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("content_hash", pa.string()),
    ]
)
SCHEMA = pa.schema([(name, pa.string()) for name in (*COPIED, "messages")] + [("media", pa.list_(_MEDIUM))])


def tokenized_beforehand(samples: pd.DataFrame) -> pd.DataFrame:
    """Choose the samples that are tokenised before a stream is trained on.

    Args:
        samples: Table `sampled_samples`.

    Returns:
        The eval split, benchmarks, and at most `PREVIEWED` training samples spread evenly, in the order of the table.
    """
    train = np.flatnonzero(samples["split"] == "train")
    if len(train) > PREVIEWED:
        train = train[np.linspace(0, len(train) - 1, PREVIEWED).round().astype(int)]
    return samples.iloc[np.sort(np.concatenate([train, np.flatnonzero(samples["split"] != "train")]))]


def write_stream_samples(path: Path, samples: pd.DataFrame, images: Mapping[str, ImageFacts]) -> None:
    """Write the training samples in groups of rows, each image with its facts: all that tokenising them takes.

    Args:
        path: Parquet file to write.
        samples: Table `sampled_samples`; an empty one for map-style types.
        images: What is known of each image, by its path.
    """
    train = samples[samples["split"] == "train"]
    with table_writer(path, SCHEMA) as writer:
        for start in range(0, len(train), ROWS_PER_GROUP):
            rows = train.iloc[start : start + ROWS_PER_GROUP][SCHEMA.names].to_dict("records")
            for row in rows:
                facts = [images[item["path"]]._asdict() if item["path"] in images else {} for item in row["media"]]
                row["media"] = [item | known for item, known in zip(row["media"], facts, strict=True)]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))

"""The table `tokenized_samples`: every sample of a data set as token ids, trained spans and media grids."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import pyarrow as pa
from transformers import ProcessorMixin

from qvl_pipeline.media.frame_store import FrameStore
from qvl_pipeline.tokens.encoding import COPIED, MediaGrids, encode_samples

ROWS_PER_BATCH = 512

_SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32())])
_MEDIUM = pa.struct(
    [
        ("type", pa.string()),
        ("key", pa.string()),
        ("grid_t", pa.int32()),
        ("grid_h", pa.int32()),
        ("grid_w", pa.int32()),
        ("seconds_per_grid", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [(name, pa.string()) for name in COPIED]
    + [("input_ids", pa.list_(pa.int32())), ("label_spans", pa.list_(_SPAN))]
    + [(name, pa.int32()) for name in ("length", "supervised_tokens", "vit_patches", "prompt_length")]
    + [("media", pa.list_(_MEDIUM))]
)


def media_grids(processor: ProcessorMixin, media_index: pd.DataFrame, store: FrameStore) -> MediaGrids:
    """Take the sizes of images from `media_index`: its `width` and `height` are those of the upright image."""
    sizes = media_index.loc[media_index["type"] == "image", ["path", "height", "width"]].dropna()
    heights, widths = sizes["height"].astype(int), sizes["width"].astype(int)
    return MediaGrids(processor, dict(zip(sizes["path"], zip(heights, widths, strict=True), strict=True)), store)


def tokenize_samples(samples: pd.DataFrame, grids: MediaGrids, processor: ProcessorMixin) -> Iterator[pa.RecordBatch]:
    """Tokenise samples, a bounded number at a time.

    Args:
        samples: Table `valid_samples`.
        grids: Sizes of all media.
        processor: The model's processor.

    Yields:
        Record batches of `tokenized_samples`, in the order of `samples`.

    Raises:
        UserError: A sample cannot be tokenised; the message names it.
    """
    for start in range(0, len(samples), ROWS_PER_BATCH):
        rows = encode_samples(samples.iloc[start : start + ROWS_PER_BATCH].to_dict("records"), grids, processor)
        for row in rows:
            row["label_spans"] = [{"start": start, "end": end} for start, end in row["label_spans"]]
        yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

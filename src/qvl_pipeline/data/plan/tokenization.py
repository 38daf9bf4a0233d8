"""The table `tokenized_samples`: every sample of a data set as token ids, trained spans and media grids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from transformers import ProcessorMixin

from qvl_pipeline.data.spread import Begun, Processes, RayTasks, in_order
from qvl_pipeline.data.tables import QUARANTINE
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.tokens.encoding import COPIED, ImageFacts, MediaGrids, encode_samples
from qvl_pipeline.tokens.unusable import Unusable

ROWS_PER_BATCH = 512
# A process takes seconds to start, in which another tokenises thousands of samples.
SAMPLES_A_WORKER = 8192
MOST_WORKERS = 16

_SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32())])
_MEDIUM = pa.struct(
    [
        ("type", pa.string()),
        ("key", pa.string()),
        ("grid_t", pa.int32()),
        ("grid_h", pa.int32()),
        ("grid_w", pa.int32()),
        ("seconds_per_grid", pa.float64()),
        ("spectra", pa.int32()),
        ("content_hash", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [(name, pa.string()) for name in COPIED]
    + [("input_ids", pa.list_(pa.int32())), ("label_spans", pa.list_(_SPAN))]
    + [(name, pa.int32()) for name in ("length", "supervised_tokens", "vit_patches", "spectra", "prompt_length")]
    + [("media", pa.list_(_MEDIUM))]
)


class Tokenized(NamedTuple):
    """Some samples, tokenised.

    Attributes:
        rows: Rows of `tokenized_samples`.
        unusable: The samples that cannot be tokenised, which are not among the rows.
    """

    rows: pa.RecordBatch
    unusable: list[Unusable]


def media_grids(
    processor: ProcessorMixin, media_index: pd.DataFrame, store: FrameStore, sounds: SoundStore | None = None
) -> MediaGrids:
    """Take the facts about images from `media_index`: its `width` and `height` are those of the upright image."""
    known = media_index.loc[media_index["type"] == "image", ["path", "height", "width", "content_hash"]]
    known = known.dropna(subset=["height", "width"])
    facts = zip(known["height"].astype(int), known["width"].astype(int), known["content_hash"], strict=True)
    return MediaGrids(processor, dict(zip(known["path"], map(ImageFacts._make, facts), strict=True)), store, sounds)


def tokenize_samples(
    samples: pd.DataFrame,
    grids: MediaGrids,
    processor: ProcessorMixin,
    *,
    workers: int = 1,
    runner: str = "native",
    ignore_empty_think: bool = True,
) -> Iterator[Tokenized]:
    """Tokenise samples, a bounded number at a time.

    Args:
        samples: Table `valid_samples`.
        grids: Sizes of all media.
        processor: The model's processor.
        workers: Processes of this machine that do it; with 1, this one does.
        runner: With `ray`, tasks of the cluster that was joined do it instead.
        ignore_empty_think: Empty thoughts before answers are not trained on.

    Yields:
        Batches in the order of `samples`; the same ones whoever makes them.

    Raises:
        UserError: A medium is not in the media index or the frame store; or a worker process died.
    """
    starts = range(0, len(samples), ROWS_PER_BATCH)
    chunks = (samples.iloc[start : start + ROWS_PER_BATCH].to_dict("records") for start in starts)
    start = partial(_tokenizer, processor, grids.store, grids.sounds, ignore_empty_think)
    if runner == "ray":
        yield from _side_by_side(chunks, grids, RayTasks(start, what="samples"))
    elif workers > 1:
        preload = [__name__, type(processor).__module__]
        yield from _side_by_side(chunks, grids, Processes(start, workers, preload))
    else:
        yield from (_tokenized(rows, grids, processor, ignore_empty_think) for rows in chunks)


def useful_workers(n_samples: int) -> int:
    """Return how many processes are worth their start, on the cores that there are."""
    return max(1, min(len(os.sched_getaffinity(0)), MOST_WORKERS, n_samples // SAMPLES_A_WORKER))


def quarantine_table(unusable: Sequence[Unusable], samples: pd.DataFrame) -> pa.Table:
    """List the samples that cannot be tokenised.

    Args:
        unusable: These samples.
        samples: Table `valid_samples`, in which they are.

    Returns:
        The table `tokenize_quarantine`.
    """
    facts = samples.set_index("sample_id")[["source", "row", "split"]].loc[[sample.sample_id for sample in unusable]]
    rows = [
        {"sample_id": sample.sample_id, **fact, "rule": sample.rule, "detail": sample.reason}
        for sample, fact in zip(unusable, facts.to_dict("records"), strict=True)
    ]
    return pa.Table.from_pylist(rows, QUARANTINE)


def _tokenized(
    rows: Sequence[Mapping[str, Any]], grids: MediaGrids, processor: ProcessorMixin, ignore_empty_think: bool
) -> Tokenized:
    encoded = encode_samples(rows, grids, processor, ignore_empty_think=ignore_empty_think)
    unusable = [sample for sample in encoded if isinstance(sample, Unusable)]
    usable = [sample for sample in encoded if not isinstance(sample, Unusable)]
    for row in usable:
        row["label_spans"] = [{"start": start, "end": end} for start, end in row["label_spans"]]
    return Tokenized(pa.RecordBatch.from_pylist(usable, schema=SCHEMA), unusable)


def _side_by_side(
    chunks: Iterable[list[dict[str, Any]]], grids: MediaGrids, pool: Processes | RayTasks
) -> Iterator[Tokenized]:
    def begin(rows: list[dict[str, Any]]) -> Begun:
        paths = {item["path"] for row in rows for item in row["media"]}
        return pool.begin(rows, {path: grids.images[path] for path in paths & grids.images.keys()})

    try:
        with closing(pool):
            yield from in_order(begin, chunks, pool.ahead)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises samples was ended from outside, most likely because memory ran out: run the "
            "pipeline 'tokenize' again on a machine with more memory or fewer cores"
        ) from error


def _tokenizer(
    processor: ProcessorMixin, store: FrameStore, sounds: SoundStore | None, ignore_empty_think: bool
) -> Callable[[list[dict[str, Any]], dict[str, ImageFacts]], Tokenized]:
    """Return what tokenises rows, with the facts about their images, in a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own

    def tokenized(rows: list[dict[str, Any]], images: dict[str, ImageFacts]) -> Tokenized:
        return _tokenized(rows, MediaGrids(processor, images, store, sounds), processor, ignore_empty_think)

    return tokenized

"""The table `tokenized_samples`: every sample of a data set as token ids, trained spans and media grids."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from transformers import ProcessorMixin

from qvl_pipeline.data.tables import QUARANTINE
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.orphans import end_with_client
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
    ignore_empty_think: bool = True,
) -> Iterator[Tokenized]:
    """Tokenise samples, a bounded number at a time.

    Args:
        samples: Table `valid_samples`.
        grids: Sizes of all media.
        processor: The model's processor.
        workers: Processes that do it; with 1, this one does.
        ignore_empty_think: Empty thoughts before answers are not trained on.

    Yields:
        Batches in the order of `samples`; the same ones for any number of workers.

    Raises:
        UserError: A medium is not in the media index or the frame store; or a worker process died.
    """
    starts = range(0, len(samples), ROWS_PER_BATCH)
    chunks = (samples.iloc[start : start + ROWS_PER_BATCH].to_dict("records") for start in starts)
    if workers > 1:
        yield from _in_parallel(chunks, grids, processor, workers, ignore_empty_think)
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


def _in_parallel(
    chunks: Iterable[list[dict[str, Any]]],
    grids: MediaGrids,
    processor: ProcessorMixin,
    workers: int,
    ignore_empty_think: bool,
) -> Iterator[Tokenized]:
    """Tokenise each chunk in one of some processes, no further ahead of the reader than two chunks for each."""
    # Forked from a clean process that has the imports done: a child starts at once, and inherits no thread or lock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(processor).__module__])
    start = processor, grids.store, grids.sounds, ignore_empty_think
    with ProcessPoolExecutor(workers, context, _start_worker, start) as pool:
        waiting: deque[Future[Tokenized]] = deque()
        try:
            for rows in chunks:
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
                paths = {item["path"] for row in rows for item in row["media"]}
                images = {path: grids.images[path] for path in paths & grids.images.keys()}
                waiting.append(pool.submit(_work, rows, images))
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises samples was ended from outside, most likely because memory ran out: run the "
                "pipeline 'tokenize' again on a machine with more memory or fewer cores"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


# What a worker process tokenises with: the processor, the sampled clips and sounds, what is done with empty thoughts.
_worker: tuple[ProcessorMixin, FrameStore, SoundStore | None, bool]


def _start_worker(
    processor: ProcessorMixin, store: FrameStore, sounds: SoundStore | None, ignore_empty_think: bool
) -> None:
    global _worker
    end_with_client()  # it would wait for work forever: its queue has an end in every one of these processes
    _worker = processor, store, sounds, ignore_empty_think
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own


def _work(rows: list[dict[str, Any]], images: dict[str, ImageFacts]) -> Tokenized:
    processor, store, sounds, ignore_empty_think = _worker
    return _tokenized(rows, MediaGrids(processor, images, store, sounds), processor, ignore_empty_think)

"""How many loader processes a rank needs: what its batches take to load, over what they take to train on."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.feed.steps import MicroBatch, PlannedFeed, SharedSteps
from qvl_pipeline.engine.feed.stream import StreamedFeed
from qvl_pipeline.engine.spec import DataSpec
from qvl_pipeline.media.arrow_rows import TokenizedSamples

# Micro-batches that are loaded to know how long it takes, evenly spread over the training.
MEASURED = 4
# Share of a device's peak that it is taken to train at: what good kernels reach, so that the loader is not the limit.
ASSUMED_MFU = 0.5
# Processes more than the mean asks for: loading takes turns of heavy and light batches, and of disks.
HEADROOM = 1.25
# Of a stream, whose samples are not known before they are read.
OF_A_STREAM = 4


def with_loaders(
    data: DataSpec, feed: PlannedFeed | StreamedFeed, builder: BatchBuilder, flops: Any, peak: float | None
) -> tuple[DataSpec, str]:
    """Settle `dataloader_num_workers`, where it is `auto`.

    Args:
        data: The run's data.
        feed: Its steps.
        builder: Loads batches.
        flops: `ModelFlops`.
        peak: FLOPs a second of the device; `None` where it is not known.

    Returns:
        The data with a number of processes; and how it came about, where that was not said.
    """
    if data.dataloader_num_workers != "auto":
        return data, ""
    number, why = OF_A_STREAM, f"{OF_A_STREAM}: a stream is not known before it is read"
    if isinstance(feed, PlannedFeed):
        seconds, batches = measured(spread(feed.shares), Path(data.tokenized), builder)
        number, why = processes_needed(seconds, batches, flops, peak, cores_of_a_rank())
    return dataclasses.replace(data, dataloader_num_workers=number), why


def cores_of_a_rank() -> int:
    """Cores that a rank of this node has for loading: its share of all, but one for training; at least 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks - 1)


def spread(steps: SharedSteps, count: int = MEASURED) -> list[MicroBatch]:
    """Choose micro-batches of a rank that are evenly spread over its steps, none of them empty."""
    numbers = sorted({round(n * (len(steps) - 1) / max(count - 1, 1)) for n in range(count)})
    chosen = [micro_batch for number in numbers for micro_batch in steps[number].micro_batches[:1]]
    return [micro_batch for micro_batch in chosen if micro_batch.sample_rows]


def measured(micro_batches: Iterable[MicroBatch], tokenized: Path, builder: BatchBuilder) -> tuple[float, list[Batch]]:
    """Load micro-batches on one core.

    Args:
        micro_batches: Which.
        tokenized: Arrow file of `tokenized_samples`.
        builder: Loads them.

    Returns:
        Seconds of all, and the batches. One whose media fail is left out: training says so when it comes to it.
    """
    samples, batches, seconds = TokenizedSamples(tokenized), [], 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    try:
        for micro_batch in micro_batches:
            started = time.perf_counter()
            try:
                rows = [samples.row(row) for row in micro_batch.sample_rows]
                batches.append(builder.build(rows, vision=micro_batch.vision, sound=micro_batch.sound))
            except Exception:  # whatever a decoder raises on a broken file
                continue
            seconds += time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    return seconds, batches


def processes_needed(
    seconds: float, batches: Sequence[Batch], flops: Any, peak: float | None, cores: int
) -> tuple[int, str]:
    """Say how many loader processes keep a device busy.

    Args:
        seconds: What loading the batches takes on one core.
        batches: The batches.
        flops: `ModelFlops`, whose `count` says what training on a batch takes.
        peak: FLOPs a second of the device; `None` where it is not known, as of a CPU.
        cores: Most processes that there can be.

    Returns:
        How many, and the sentence that says why, or that there are too few cores.
    """
    if not batches:
        return 1, "1, as no batch could be loaded to see what it takes"
    load_s = seconds / len(batches)
    if peak is None:
        return 1, f"1: a batch takes {load_s:.3g} s to load, and how fast this device trains is not known"
    train_s = sum(map(flops.count, batches)) / len(batches) / (ASSUMED_MFU * peak)
    needed = max(1, math.ceil(HEADROOM * load_s / train_s))
    why = (
        f"{min(needed, cores)}: a batch takes {load_s:.3g} s of a core to load and at least {train_s:.3g} s to train on"
    )
    if needed > cores:
        why += (
            f", which takes {needed}, but a rank has {cores} cores for it: it may wait {1 - cores / needed:.0%} of the "
            "time; smaller images, stored frames (sample.materialize) or more cores help"
        )
    return min(needed, cores), why

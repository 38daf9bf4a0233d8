"""Micro-batches as tensors, prepared ahead of time in loader processes; media that fail are named, or left out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from qvl_pipeline.engine.feed.batch import BadSample, Batch, BatchBuilder
from qvl_pipeline.engine.feed.steps import MicroBatch
from qvl_pipeline.engine.signals import start_loader
from qvl_pipeline.engine.spec import DataSpec
from qvl_pipeline.media.arrow_rows import TokenizedSamples


class BadSampleError(RuntimeError):
    """A sample's media cannot be loaded, and it may not be skipped. `sample_ids` names it."""

    def __init__(self, bad: BadSample) -> None:
        """Say what is wrong with which sample."""
        super().__init__(f"sample '{bad.sample_id}': {bad.reason} (on_bad_sample: skip would leave it out)")
        self.sample_ids = [bad.sample_id]


class LoaderDiedError(RuntimeError):
    """A loader process was killed. `sample_ids` are those of the micro-batch that was waited for."""

    def __init__(self, sample_ids: list[str], reason: str) -> None:
        """Say what was waited for."""
        super().__init__(
            f"a loader process died ({reason}) before it had prepared the samples {', '.join(sample_ids[:5])}; if the "
            "machine ran out of memory, lower dataloader_num_workers or dataloader_prefetch_factor"
        )
        self.sample_ids = sample_ids


@dataclass(frozen=True)
class LoaderOptions:
    """How micro-batches are prepared.

    Attributes:
        num_workers: Loader processes, which live as long as the run; 0 loads in the training process.
        prefetch_factor: Micro-batches that each process prepares ahead.
        pin_memory: Pin the tensors for copies to a GPU.
        skip_bad_samples: Leave out a sample whose media fail; otherwise that is an error.
    """

    num_workers: int
    prefetch_factor: int
    pin_memory: bool
    skip_bad_samples: bool

    @classmethod
    def from_spec(cls, data: DataSpec, *, cuda: bool) -> LoaderOptions:
        """Take the options of a run, whose number of processes is known."""
        return cls(
            num_workers=int(data.dataloader_num_workers),
            prefetch_factor=data.dataloader_prefetch_factor,
            pin_memory=data.dataloader_pin_memory and cuda,
            skip_bad_samples=data.on_bad_sample == "skip",
        )


def load_batches(
    micro_batches: Iterable[MicroBatch], tokenized: Path, builder: BatchBuilder, options: LoaderOptions
) -> Iterator[Batch]:
    """Iterate over micro-batches as tensors, in order.

    Args:
        micro_batches: What to load; read as far ahead as batches are prepared, and no further.
        tokenized: Arrow file of `tokenized_samples`.
        builder: Builds a batch from rows.
        options: How.

    Yields:
        A batch for each micro-batch.

    Raises:
        BadSampleError: A sample's media fail, and may not be skipped.
        LoaderDiedError: A loader process was killed.
    """
    ahead, awaited = itertools.tee(micro_batches)
    dataset = _MicroBatches(tokenized, builder, skip_bad_samples=options.skip_bad_samples)
    batches = iter(
        DataLoader(
            dataset,
            sampler=ahead,
            batch_size=None,
            num_workers=options.num_workers,
            prefetch_factor=options.prefetch_factor if options.num_workers else None,
            worker_init_fn=start_loader,
            pin_memory=options.pin_memory,
            # A loader draws a seed for its processes when it starts: from the generator that a checkpoint holds, a run
            # would go on with other random numbers than without having been cut off.
            generator=torch.Generator(),
        )
    )
    for micro_batch in awaited:
        try:
            batch = next(batches)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise LoaderDiedError(dataset.sample_ids(micro_batch), str(error).splitlines()[0]) from error
        if isinstance(batch, BadSample):
            raise BadSampleError(batch)
        yield batch


class _MicroBatches(Dataset[Batch]):
    """Micro-batches, built when asked for; reads the tokenized samples in the process that builds."""

    def __init__(self, tokenized: Path, builder: BatchBuilder, *, skip_bad_samples: bool) -> None:
        self._tokenized = tokenized
        self._builder = builder
        self._skips = skip_bad_samples

    @cached_property
    def _samples(self) -> TokenizedSamples:
        return TokenizedSamples(self._tokenized)  # a stream does without

    def _rows(self, micro_batch: MicroBatch) -> Sequence[dict[str, Any]]:
        if micro_batch.samples is not None:
            return micro_batch.samples
        return [self._samples.row(row) for row in micro_batch.sample_rows]

    def sample_ids(self, micro_batch: MicroBatch) -> list[str]:
        return [row["sample_id"] for row in self._rows(micro_batch)]

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | BadSample:
        """Build a batch, or say which sample cannot be used: an exception would reach the trainer as a wall of text."""
        rows = self._rows(micro_batch)
        try:
            return self._builder.build(rows, vision=micro_batch.vision, sound=micro_batch.sound)
        except Exception:
            bad = self._bad(rows)
            if not bad:
                raise
        if not self._skips:
            return next(iter(bad.values()))
        good = [row for number, row in enumerate(rows) if number not in bad]
        built = self._builder.build(good, vision=micro_batch.vision, sound=micro_batch.sound)
        return dataclasses.replace(built, skipped=tuple(bad.values()))

    def _bad(self, rows: Sequence[dict[str, Any]]) -> dict[int, BadSample]:
        """Find the samples whose media cannot be loaded, by their number in the micro-batch."""
        bad = {}
        for number, row in enumerate(rows):
            try:
                self._builder.check_media(row["media"])
            except Exception as error:  # whatever a decoder raises on a broken file
                trained = sum(int(end - start) for start, end in row["label_spans"])
                bad[number] = BadSample(row["sample_id"], trained, str(error) or type(error).__name__)
        return bad

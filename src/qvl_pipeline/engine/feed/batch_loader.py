"""Micro-batches as tensors, prepared ahead of time in loader processes; media that fail are named, or left out.

How far ahead is bounded by bytes: a micro-batch with many pixels is loaded in pieces, each an item of the loader like a
small micro-batch. So the processes share a long clip, and what they hold ready does not grow with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from qvl_pipeline.engine.feed.batch import PIECE_BYTES, BadSample, Batch, BatchBuilder
from qvl_pipeline.engine.feed.steps import MicroBatch
from qvl_pipeline.engine.parallel.sequence_parallel import PATCHES_PER_TOKEN
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
        prefetch_factor: Micro-batches, or pieces of heavy ones, that each process prepares ahead.
        pin_memory: Pin the tensors for copies to a GPU.
        skip_bad_samples: Leave out a sample whose media fail; otherwise that is an error.
        most_patches: Patches that a micro-batch may have, all ranks of a sequence-parallel group together.
        piece_bytes: Pixels of a micro-batch that one process loads; of more, several load a piece each.
    """

    num_workers: int
    prefetch_factor: int
    pin_memory: bool
    skip_bad_samples: bool
    most_patches: int = 0
    piece_bytes: int = PIECE_BYTES

    @classmethod
    def from_spec(cls, data: DataSpec, *, cuda: bool) -> LoaderOptions:
        """Take the options of a run, whose number of processes is known."""
        return cls(
            num_workers=int(data.dataloader_num_workers),
            prefetch_factor=data.dataloader_prefetch_factor,
            pin_memory=data.dataloader_pin_memory and cuda,
            skip_bad_samples=data.on_bad_sample == "skip",
            most_patches=data.per_device_train_batch_size * data.packing_length * PATCHES_PER_TOKEN,
        )

    def pieces_of(self, patches: int, builder: BatchBuilder) -> int:
        """Say in how many pieces a micro-batch of so many patches is loaded."""
        mine = patches * builder.patch_values // builder.share.degree
        return max(1, math.ceil(mine / self.piece_bytes)) if self.num_workers else 1

    def items_ahead(self, builder: BatchBuilder) -> int | None:
        """Say how many micro-batches or pieces each process prepares ahead; `None` without processes."""
        if not self.num_workers:
            return None
        return items_ahead(self.pieces_of(self.most_patches, builder), self.num_workers, self.prefetch_factor)


def items_ahead(pieces: int, num_workers: int, prefetch_factor: int) -> int:
    """Say how many micro-batches or pieces each process prepares ahead; all together, the heaviest one at least.

    Training would wait for what is behind it otherwise, whenever it comes to such a micro-batch.

    Args:
        pieces: Pieces of the heaviest micro-batch.
        num_workers: Loader processes, at least 1.
        prefetch_factor: What is asked for.
    """
    return prefetch_factor if pieces == 1 else max(prefetch_factor, 1 + math.ceil(pieces / num_workers))


def load_batches(
    micro_batches: Iterable[MicroBatch], tokenized: Path, builder: BatchBuilder, options: LoaderOptions
) -> Iterator[Batch]:
    """Iterate over micro-batches as tensors, in order.

    Args:
        micro_batches: What to load; read as far ahead as batches are prepared, and no further. Beside the batch that
            comes, `num_workers` times `items_ahead` are ready or under way, of `piece_bytes` each at most.
        tokenized: Arrow file of `tokenized_samples`.
        builder: Builds a batch from rows.
        options: How.

    Yields:
        A batch for each micro-batch.

    Raises:
        BadSampleError: A sample's media fail, and may not be skipped.
        LoaderDiedError: A loader process was killed.
    """
    # How many micro-batches are read ahead does not depend on their pieces: a stream exchanges facts among ranks at
    # each step that is read, and ranks that read different steps would wait for each other for ever. None has fewer
    # than one piece, so those that are read are enough for all that the loader asks for.
    source, behind = iter(micro_batches), options.num_workers * (options.items_ahead(builder) or 0)
    awaited = deque(itertools.islice(source, behind + 1))
    unsent = deque(awaited)
    dataset = _MicroBatches(tokenized, builder, skip_bad_samples=options.skip_bad_samples)
    batches = iter(
        DataLoader(
            dataset,
            sampler=_pieces_of(unsent, builder, options),
            batch_size=None,
            num_workers=options.num_workers,
            prefetch_factor=options.items_ahead(builder),
            worker_init_fn=start_loader,
            pin_memory=options.pin_memory,
            # A loader draws a seed for its processes when it starts: from the generator that a checkpoint holds, a run
            # would go on with other random numbers than without having been cut off.
            generator=torch.Generator(),
        )
    )
    while awaited:
        micro_batch = awaited.popleft()
        try:
            pieces = [next(batches) for _ in range(options.pieces_of(micro_batch.patches, builder))]
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise LoaderDiedError(dataset.sample_ids(micro_batch), str(error).splitlines()[0]) from error
        if any(piece is None for piece in pieces):
            pieces.clear()  # make room for them once more
            pieces.append(dataset.built(micro_batch))
        batch = _joined(pieces, pinned=options.pin_memory)
        if isinstance(batch, BadSample):
            raise BadSampleError(batch)
        yield batch
        for micro_batch in itertools.islice(source, 1):
            awaited.append(micro_batch)
            unsent.append(micro_batch)


@dataclass(frozen=True)
class _Piece:
    """One of `count` pieces of a micro-batch; the first is the batch, with its share of the pixels."""

    micro_batch: MicroBatch
    number: int
    count: int


def _pieces_of(unsent: deque[MicroBatch], builder: BatchBuilder, options: LoaderOptions) -> Iterator[_Piece]:
    while unsent:
        micro_batch = unsent.popleft()
        count = options.pieces_of(micro_batch.patches, builder)
        yield from (_Piece(micro_batch, number, count) for number in range(count))


def _joined(pieces: Sequence[Any], *, pinned: bool) -> Batch | BadSample:
    """Make one batch of the first piece and the pixels that are the others."""
    batch, *rest = pieces
    if not rest:
        return batch
    pixels = [batch.patches, *rest]
    shape = sum(map(len, pixels)), pixels[0].shape[1]
    joined = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    return dataclasses.replace(batch, patches=torch.cat(pixels, out=joined))


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

    def __getitem__(self, piece: _Piece) -> Batch | BadSample | torch.Tensor | None:
        """Build a batch or load a piece of its pixels; `None` where a piece cannot be: all are looked through then."""
        if piece.count == 1:
            return self.built(piece.micro_batch)
        rows, calls = self._rows(piece.micro_batch), piece.micro_batch
        with contextlib.suppress(Exception):  # whatever a decoder raises on a broken file
            if piece.number:
                return self._builder.piece(rows, piece.number, piece.count)
            return self._builder.build(rows, vision=calls.vision, sound=calls.sound, pieces=piece.count)
        return None

    def built(self, micro_batch: MicroBatch) -> Batch | BadSample:
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

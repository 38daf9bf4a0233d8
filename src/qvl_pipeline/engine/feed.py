"""Which samples a rank sees in which micro-batch: the pack plan, shared out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from torch.utils.data import DataLoader, Dataset

from qvl_pipeline.engine.batch import Batch, BatchBuilder
from qvl_pipeline.engine.stopping import leave_stopping_to_the_trainer
from qvl_pipeline.media.arrow_rows import TokenizedSamples


@dataclass(frozen=True)
class Pack:
    """One row of `pack_plan`."""

    sample_rows: tuple[int, ...]
    tokens: int
    vit_patches: int
    supervised_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward pass; `vision`: some rank has media in it."""

    sample_rows: tuple[int, ...]
    vision: bool


@dataclass(frozen=True)
class Step:
    """One optimizer step, as every rank knows it.

    Attributes:
        number: 1-based.
        micro_batches: The micro-batches of this rank; equally many on every rank.
        packs: Packs over all ranks.
        tokens: Tokens over all ranks.
        supervised_tokens: Trained tokens over all ranks: the denominator of the loss.
    """

    number: int
    micro_batches: tuple[MicroBatch, ...]
    packs: int
    tokens: int
    supervised_tokens: int


def read_plan(path: Path) -> list[list[Pack]]:
    """Read a pack plan: the packs of each step, in order.

    Raises:
        ValueError: The plan has no packs, or its steps are not numbered 0, 1, 2, …
    """
    rows = pq.ParquetFile(path).read().to_pylist()  # `read_table` would import pandas where it is installed
    steps: list[list[Pack]] = []
    for row in rows:
        if row["step"] == len(steps):
            steps.append([])
        if row["step"] != len(steps) - 1:
            raise ValueError(f"{path}: step {row['step']} follows step {len(steps) - 1}")
        columns = ("tokens", "vit_patches", "supervised_tokens")
        steps[-1].append(Pack(tuple(row["sample_rows"]), *(row[name] for name in columns)))
    if not steps:
        raise ValueError(f"{path}: the plan has no packs")
    return steps


def share_out(
    plan: list[list[Pack]], rank: int, world_size: int, packs_per_micro_batch: int, *, always_vision: bool = False
) -> list[Step]:
    """Take a rank's share of every step.

    Rank `r` of `R` takes packs `r, r+R, …`. All ranks run equally many micro-batches, and call the vision tower in the
    same ones, which each can tell from the plan: so no rank waits in a collective that another never enters.

    Args:
        plan: The packs of each step.
        rank: Data-parallel rank.
        world_size: Data-parallel ranks.
        packs_per_micro_batch: Packs in one forward pass.
        always_vision: Call the tower in every micro-batch: when nothing else is trained, one without it would have no
            gradient at all.

    Returns:
        The steps of this rank.
    """
    steps = []
    for number, packs in enumerate(plan, start=1):
        shares = [packs[r::world_size] for r in range(world_size)]
        micro_batches = []
        for start in range(0, len(shares[0]), packs_per_micro_batch):
            parts = [share[start : start + packs_per_micro_batch] for share in shares]
            vision = always_vision or any(pack.vit_patches for part in parts for pack in part)
            micro_batches.append(MicroBatch(tuple(row for pack in parts[rank] for row in pack.sample_rows), vision))
        steps.append(
            Step(
                number=number,
                micro_batches=tuple(micro_batches),
                packs=len(packs),
                tokens=sum(pack.tokens for pack in packs),
                supervised_tokens=sum(pack.supervised_tokens for pack in packs),
            )
        )
    return steps


class _MicroBatches(Dataset[Batch]):
    """Micro-batches by number, built when asked for; reads the tokenized samples in the worker that builds."""

    def __init__(self, steps: list[Step], tokenized: Path, builder: BatchBuilder) -> None:
        self._micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
        self._samples = TokenizedSamples(tokenized)
        self._builder = builder

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __getitem__(self, number: int) -> Batch:
        micro_batch = self._micro_batches[number]
        rows = [self._samples.row(row) for row in micro_batch.sample_rows]
        return self._builder.build(rows, vision=micro_batch.vision)


def load_batches(
    steps: list[Step], tokenized: Path, builder: BatchBuilder, *, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Iterate over the batches of all micro-batches of `steps`, in order.

    Args:
        steps: The steps still to do.
        tokenized: Arrow file of `tokenized_samples`.
        builder: Builds a batch from rows.
        num_workers: Loader processes; 0 loads in this process.
        pin_memory: Pin the batches for copies to a GPU.

    Returns:
        An iterator over batches.
    """
    return iter(
        DataLoader(
            _MicroBatches(steps, tokenized, builder),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            worker_init_fn=leave_stopping_to_the_trainer,
            pin_memory=pin_memory,
        )
    )

"""Which samples a rank sees in which micro-batch: the pack plan, shared out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl_pipeline.engine.feed.batch import BadSample
from qvl_pipeline.storage.tables import read_table


@dataclass(frozen=True)
class Pack:
    """One row of `pack_plan`."""

    sample_rows: tuple[int, ...]
    tokens: int
    vit_patches: int
    supervised_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward pass.

    Attributes:
        sample_rows: Rows of `tokenized_samples`, or of `stream_samples`.
        vision: Some rank has media in it.
        samples: The samples themselves, where they were tokenised as they were read.
    """

    sample_rows: tuple[int, ...]
    vision: bool
    samples: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Step:
    """One optimizer step, as every rank knows it.

    Attributes:
        number: 1-based.
        micro_batches: The micro-batches of this rank; equally many on every rank.
        packs: Packs over all ranks.
        tokens: Tokens over all ranks.
        supervised_tokens: Trained tokens over all ranks: the denominator of the loss.
        epoch: Passes over the data after this step.
        position: Where a stream is after this step; `None` for a plan, whose position is the step.
        left_out: Samples that this rank's part of a stream met for the first time, and cannot be trained on.
    """

    number: int
    micro_batches: tuple[MicroBatch, ...]
    packs: int
    tokens: int
    supervised_tokens: int
    epoch: float
    position: dict[str, str] | None = None
    left_out: tuple[BadSample, ...] = ()


def read_plan(path: Path) -> list[list[Pack]]:
    """Read a pack plan: the packs of each step, in order.

    Raises:
        DamagedError: The file is not what was written.
        ValueError: The plan has no packs, or its steps are not numbered 0, 1, 2, …
    """
    rows = read_table(path, advice="run the pipeline 'tokenize' again").to_pylist()
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
    plan: list[list[Pack]],
    rank: int,
    world_size: int,
    packs_per_micro_batch: int,
    *,
    always_vision: bool = False,
    epochs: float = 1.0,
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
        epochs: Passes over the data that the plan makes.

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
                epoch=epochs * number / len(plan),
            )
        )
    return steps


def heaviest_micro_batches(
    plan: list[list[Pack]], world_size: int, packs_per_micro_batch: int
) -> list[tuple[int, int]]:
    """Find the micro-batch in which some rank has most tokens, and the one in which some rank has most patches.

    Args:
        plan: The packs of each step.
        world_size: Data-parallel ranks.
        packs_per_micro_batch: Packs in one forward pass.

    Returns:
        Number of the step and of its micro-batch, both from 0; one pair where they are the same.
    """
    heaviest = {"tokens": (-1, (0, 0)), "vit_patches": (-1, (0, 0))}
    for number, packs in enumerate(plan):
        for start in range(0, len(packs[::world_size]), packs_per_micro_batch):
            parts = [packs[rank::world_size][start : start + packs_per_micro_batch] for rank in range(world_size)]
            for name, (most, _) in heaviest.items():
                total = max(sum(getattr(pack, name) for pack in part) for part in parts)
                if total > most:
                    heaviest[name] = total, (number, start // packs_per_micro_batch)
    return list(dict.fromkeys(place for _, place in heaviest.values()))


class PlannedFeed:
    """The steps of a plan, as one rank takes them; `heaviest` are the micro-batches with most tokens and patches."""

    def __init__(self, steps: list[Step], heaviest: Sequence[tuple[int, int]] = ()) -> None:
        """Take the steps that `share_out` gives this rank, and what `heaviest_micro_batches` finds in them."""
        self._steps = steps
        self.heaviest = [steps[step].micro_batches[number] for step, number in heaviest]
        self.accumulates = any(len(step.micro_batches) > 1 for step in steps)
        self.max_steps = len(steps)
        self.tokens = sum(step.tokens for step in steps)
        self.supervised_tokens = sum(step.supervised_tokens for step in steps)

    def steps_after(self, done: int) -> Iterable[Step]:
        """Return the steps that are left."""
        return self._steps[done:]

    def finish(self, step: Step) -> None:
        """Nothing is to be remembered of a finished step: where a plan is, its number says."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the plan is a file, and the step is the checkpoint's own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""

"""Which samples a rank sees in which micro-batch: the pack plan, shared out."""

from __future__ import annotations

from collections.abc import Iterable
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
    spectra: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward pass.

    Attributes:
        sample_rows: Rows of `tokenized_samples`, or of `stream_samples`.
        vision: Some rank has images or clips in it.
        sound: Some rank has sounds in it.
        samples: The samples themselves, where they were tokenised as they were read.
    """

    sample_rows: tuple[int, ...]
    vision: bool
    sound: bool = False
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
        columns = ("tokens", "vit_patches", "supervised_tokens", "spectra")
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
    always_sound: bool = False,
    epochs: float = 1.0,
) -> list[Step]:
    """Take a rank's share of every step.

    Rank `r` of `R` takes packs `r, r+R, …`. All ranks run equally many micro-batches, and call the towers in the same
    ones, which each can tell from the plan: so no rank waits in a collective that another never enters.

    Args:
        plan: The packs of each step.
        rank: Data-parallel rank.
        world_size: Data-parallel ranks.
        packs_per_micro_batch: Packs in one forward pass.
        always_vision: Call the vision tower in every micro-batch: when nothing else is trained, one without it would
            have no gradient at all.
        always_sound: The same of the audio tower.
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
            sound = always_sound or any(pack.spectra for part in parts for pack in part)
            rows = tuple(row for pack in parts[rank] for row in pack.sample_rows)
            micro_batches.append(MicroBatch(rows, vision, sound))
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


class PlannedFeed:
    """The steps of a plan, as one rank takes them."""

    def __init__(self, steps: list[Step]) -> None:
        """Take the steps that `share_out` gives this rank."""
        self._steps = steps
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

"""Which samples a rank sees in which micro-batch: the pack plan, shared out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_pipeline.engine.feed.batch import BadSample
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.storage.tables import read_table


@dataclass(frozen=True)
class PackPlan:
    """`pack_plan` as columns: 4 bytes a sample and some 40 a pack, where Python's own objects would take a hundred.

    Attributes:
        steps: Number of the first pack of each step, and then the number of packs, `[steps + 1]`.
        bounds: Where the rows of each pack begin, and then the number of rows, `[packs + 1]`.
        rows: Rows of `tokenized_samples`, pack by pack, int32.
        tokens: Of each pack, `[packs]`.
        vit_patches: Of each pack.
        supervised_tokens: Of each pack.
        spectra: Of its sounds.
    """

    steps: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    vit_patches: np.ndarray
    supervised_tokens: np.ndarray
    spectra: np.ndarray

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps) - 1

    def sample_rows(self, packs: Iterable[int]) -> tuple[int, ...]:
        """Rows of the samples of some packs, in order."""
        bounds = self.bounds
        return tuple(row for pack in packs for row in self.rows[bounds[pack] : bounds[pack + 1]].tolist())


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward pass.

    Attributes:
        sample_rows: Rows of `tokenized_samples`, or of `stream_samples`.
        vision: Some rank has images or clips in it.
        sound: Some rank has sounds in it.
        samples: The samples themselves, where they were tokenised as they were read.
        patches: Patches of its images and clips.
    """

    sample_rows: tuple[int, ...]
    vision: bool
    sound: bool = False
    samples: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)
    patches: int = 0

    def sample_ids(self, tokenized: Path) -> list[str]:
        """Return the ids of its samples, which those of a plan have in the file `tokenized`."""
        if self.samples is not None:
            return [sample["sample_id"] for sample in self.samples]
        if not self.sample_rows:
            return []
        ids = TokenizedSamples(tokenized).columns(["sample_id"])["sample_id"]
        return [ids[row].as_py() for row in self.sample_rows]


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


def read_plan(path: Path) -> PackPlan:
    """Read a pack plan.

    Raises:
        DamagedError: The file is not what was written.
        ValueError: The plan has no packs, or its steps are not numbered 0, 1, 2, …
    """
    table = read_table(path, advice="run the pipeline 'tokenize' again")
    if not len(table):
        raise ValueError(f"{path}: the plan has no packs")
    step = _values(table["step"])
    before = np.concatenate([[-1], step[:-1]])
    wrong = (step != before) & (step != before + 1)
    wrong[0] = step[0] != 0
    if wrong.any():
        pack = int(wrong.argmax())
        raise ValueError(f"{path}: step {step[pack]} follows step {before[pack]}")
    lengths = _values(pc.list_value_length(table["sample_rows"]))
    return PackPlan(
        np.append(np.flatnonzero(step != before), len(step)),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        _values(pc.list_flatten(table["sample_rows"])),
        *(_values(table[name]) for name in ("tokens", "vit_patches", "supervised_tokens", "spectra")),
    )


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """Copy a column of integers without nulls. Arrow's own `to_numpy` imports pandas where it is installed."""
    width = column.type.bit_width // 8
    parts = [np.frombuffer(chunk.buffers()[1], f"i{width}")[chunk.offset :][: len(chunk)] for chunk in column.chunks]
    return np.concatenate(parts)


class SharedSteps(Sequence[Step]):
    """A rank's share of every step of a plan; each `Step` is made when it is asked for.

    Rank `r` of `R` takes packs `r, r+R, …`. All ranks run equally many micro-batches, and call each tower in the
    same ones, which each can tell from the plan: so no rank waits in a collective that another never enters.
    """

    def __init__(
        self,
        plan: PackPlan,
        rank: int,
        world_size: int,
        packs_per_micro_batch: int,
        *,
        always_vision: bool = False,
        always_sound: bool = False,
        epochs: float = 1.0,
    ) -> None:
        """Share out a plan.

        Args:
            plan: The packs of each step.
            rank: Data-parallel rank.
            world_size: Data-parallel ranks.
            packs_per_micro_batch: Packs in one forward pass.
            always_vision: Call the vision tower in every micro-batch: when nothing else is trained, one without it
                would have no gradient at all.
            always_sound: The same of the audio tower.
            epochs: Passes over the data that the plan makes.
        """
        self.plan = plan
        self._rank, self._world_size, self._packs = rank, world_size, packs_per_micro_batch
        self._always_vision, self._always_sound, self._epochs = always_vision, always_sound, epochs

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.plan)

    def __getitem__(self, index: Any) -> Any:
        """Make a step, or the steps of a slice."""
        if isinstance(index, slice):
            return [self._step(number) for number in range(len(self))[index]]
        return self._step(range(len(self))[index])

    def _step(self, number: int) -> Step:
        plan = self.plan
        first, end = plan.steps[number : number + 2].tolist()
        # Packs that the ranks take side by side in one micro-batch follow each other in the plan.
        together = self._packs * self._world_size
        micro_batches = []
        for start in range(first, end, together):
            stop = min(start + together, end)
            vision = self._always_vision or bool(plan.vit_patches[start:stop].any())
            sound = self._always_sound or bool(plan.spectra[start:stop].any())
            own = range(start + self._rank, stop, self._world_size)
            patches = int(plan.vit_patches[own].sum())
            micro_batches.append(MicroBatch(plan.sample_rows(own), vision, sound, patches=patches))
        return Step(
            number=number + 1,
            micro_batches=tuple(micro_batches),
            packs=end - first,
            tokens=int(plan.tokens[first:end].sum()),
            supervised_tokens=int(plan.supervised_tokens[first:end].sum()),
            epoch=self._epochs * (number + 1) / len(plan),
        )

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches."""
        return bool(np.diff(self.plan.steps).max() > self._packs * self._world_size)

    def heaviest(self) -> list[tuple[int, int]]:
        """Find the micro-batches in which some rank has most tokens, most patches, and most spectra if there are any.

        Returns:
            Number of the step and of its micro-batch, both from 0; no pair twice.
        """
        steps, together = self.plan.steps, self._packs * self._world_size
        sizes = np.diff(steps)
        step = np.repeat(np.arange(len(self)), sizes)
        place = np.arange(len(step)) - steps[step]
        before = np.concatenate([[0], np.cumsum(-(-sizes // together))])
        share = (before[step] + place // together) * self._world_size + place % self._world_size
        found = []
        sounds = [self.plan.spectra] if self.plan.spectra.any() else []
        for amounts in (self.plan.tokens, self.plan.vit_patches, *sounds):
            micro_batch = int(np.bincount(share, amounts).argmax()) // self._world_size
            number = int(np.searchsorted(before, micro_batch, side="right")) - 1
            found.append((number, micro_batch - int(before[number])))
        return list(dict.fromkeys(found))


class PlannedFeed:
    """The steps of a plan, as one rank takes them; `shares` are all of them."""

    def __init__(self, steps: SharedSteps) -> None:
        """Take the steps of this rank."""
        self.shares = steps
        self.max_steps = len(steps)
        self.tokens = int(steps.plan.tokens.sum())
        self.supervised_tokens = int(steps.plan.supervised_tokens.sum())

    def steps_after(self, done: int) -> Iterator[Step]:
        """Make the steps that are left, one after the other."""
        return (self.shares[number] for number in range(done, self.max_steps))

    def finish(self, step: Step) -> None:
        """Nothing is to be remembered of a finished step: where a plan is, its number says."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the plan is a file, and the step is the checkpoint's own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""

"""Steps without a plan: samples are read, tokenised, shuffled and packed while training goes on.

The stream has as many lanes as a step has packs. Each lane reads rows of its own, has its own shuffle buffer and
packer, and gives one pack to every step; rank `r` of `R` runs the lanes `r, r + R, …`. So the steps are the same on any
number of ranks, and a stream goes on exactly where it was, on any number of ranks: each lane is saved by itself.

The lanes of a rank run in a process of their own, ahead of training; only sums over ranks are made in the trainer.s.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import ceil, floor
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from qvl_pipeline.engine.feed.batch import BadSample
from qvl_pipeline.engine.feed.steps import MicroBatch, Step
from qvl_pipeline.engine.feed.stream_packing import PACK_WINDOW, fill_pack, work
from qvl_pipeline.engine.signals import start_loader
from qvl_pipeline.engine.spec import StreamSpec
from qvl_pipeline.errors import UserError
from qvl_pipeline.tokens.unusable import Unusable

# Samples that a lane tokenises together.
TOKENISED_TOGETHER = 16
# Steps whose packs are made ahead.
STEPS_AHEAD = 2

Exchange = Callable[[Sequence[int]], list[int]]


class Samples(Protocol):
    """Where a stream comes from: `tokens.raw_samples.RawSamples`."""

    num_shards: int

    def sources(self, shard: int) -> tuple[int, list[str]]:
        """Return the number of a shard's first row, and the source of each of its rows."""

    def samples(self, rows: Sequence[int]) -> list[dict[str, Any] | Unusable]:
        """Tokenise rows, by their numbers."""


def host_sum(copies: int, timeout_s: float) -> Exchange:
    """Make a function that sums integers over all ranks without touching a GPU.

    Args:
        copies: Ranks that hold the same values, and are to count as one: those of a sequence-parallel group.
        timeout_s: Seconds after which a rank that does not come ends the run.
    """
    if dist.get_world_size() == 1:
        return list
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def exchange(values: Sequence[int]) -> list[int]:
        sums = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(sums, group=group)
        return (sums // copies).tolist()

    return exchange


class StreamedFeed:
    """The steps of a stream, as one rank takes them."""

    def __init__(
        self,
        samples: Samples,
        spec: StreamSpec,
        rank: int,
        world_size: int,
        packs_per_micro_batch: int,
        exchange: Exchange,
        *,
        always_vision: bool = False,
        always_sound: bool = False,
        aside: bool = False,
    ) -> None:
        """Stand at the beginning of the stream.

        Args:
            samples: Where it comes from.
            spec: How samples are shuffled and packed.
            rank: Data-parallel rank.
            world_size: Data-parallel ranks.
            packs_per_micro_batch: Packs in one forward pass.
            exchange: Sums integers over the data-parallel ranks. It is called once a step by all of them, while the
                step is prepared: that is how each knows the tokens of all, and in which micro-batches some rank has
                media.
            always_vision: Call the vision tower in every micro-batch.
            always_sound: Call the audio tower in every micro-batch.
            aside: Read, tokenise and pack in a process aside.
        """
        self.max_steps = spec.max_steps
        self.tokens = self.supervised_tokens = self._passed = 0
        self._spec, self._exchange, self._aside = spec, exchange, aside
        self._always_vision, self._always_sound = always_vision, always_sound
        self._packs_per_micro_batch = packs_per_micro_batch
        self._micro_batches = ceil(ceil(spec.packs_per_step / world_size) / packs_per_micro_batch)
        self._lanes = [Lane(number, samples, spec) for number in range(rank, spec.packs_per_step, world_size)]
        self._position = _position(self._lanes, 0, 0, 0)

    def steps_after(self, done: int) -> Iterator[Step]:
        """Prepare the steps after `done`, one after the other, when asked for the next.

        Raises:
            UserError: A sample cannot be used and may not be left out, or there are fewer samples than packs per step.
        """
        tokens, supervised_tokens, passed = self.tokens, self.supervised_tokens, self._passed
        made = iter(self._loader(self.max_steps - done))
        for number in range(done + 1, self.max_steps + 1):
            share = next(made)
            if isinstance(share, UserError):
                raise share
            starts = range(0, self._micro_batches * self._packs_per_micro_batch, self._packs_per_micro_batch)
            parts = [share.packs[start : start + self._packs_per_micro_batch] for start in starts]
            parts = [[sample for pack in part for sample in pack] for part in parts]
            mine = [sample for part in parts for sample in part]
            facts = [sum(sample[fact] for sample in mine) for fact in ("length", "supervised_tokens")]
            patches, spectra = ([sum(s[of] for s in part) for part in parts] for of in ("vit_patches", "spectra"))
            facts = self._exchange([*facts, len(mine) + share.passed_over, *patches, *spectra])
            step_tokens, step_supervised, step_passed, *media = facts
            seen, heard = media[: len(parts)], media[len(parts) :]
            tokens, supervised_tokens = tokens + step_tokens, supervised_tokens + step_supervised
            passed += step_passed
            yield Step(
                number=number,
                micro_batches=tuple(
                    MicroBatch(
                        tuple(s["row"] for s in part),
                        vision=self._always_vision or bool(on_some_rank),
                        sound=self._always_sound or bool(heard_on_some),
                        samples=tuple(part),
                        patches=own,
                    )
                    for part, own, on_some_rank, heard_on_some in zip(parts, patches, seen, heard, strict=True)
                ),
                packs=self._spec.packs_per_step,
                tokens=step_tokens,
                supervised_tokens=step_supervised,
                epoch=passed / self._spec.samples_per_epoch,
                position=_position((), tokens, supervised_tokens, passed) | share.lanes,
                left_out=share.left_out,
            )

    def _loader(self, steps: int) -> DataLoader:
        return DataLoader(
            _Shares(self._lanes, steps),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=int(self._aside),
            prefetch_factor=STEPS_AHEAD if self._aside else None,
            worker_init_fn=start_loader,
            generator=torch.Generator(),  # training must not notice in its own
        )

    def finish(self, step: Step) -> None:
        """Move on to the position after `step`; steps that are prepared ahead do not count."""
        self._position = step.position
        self.tokens, self.supervised_tokens, self._passed = json.loads(step.position["counts"])

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last finished step: that of each lane of this rank, by the lane's name."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position; `state_dict` has the lanes of this rank, whichever ranks saved them."""
        self._position = dict(state_dict)
        self.tokens, self.supervised_tokens, self._passed = json.loads(state_dict["counts"])
        for lane in self._lanes:
            lane.restore(json.loads(state_dict[f"lane{lane.number}"]))


def _position(lanes: Sequence[Lane], *counts: int) -> dict[str, str]:
    """A position as plain values: tokens, supervised tokens and samples so far, and the state of each lane."""
    return {"counts": json.dumps(counts)} | {f"lane{lane.number}": json.dumps(lane.state()) for lane in lanes}


@dataclass(frozen=True)
class _Share:
    """What a rank's lanes give to one step: a pack each, and what they passed over on the way."""

    packs: list[list[dict[str, Any]]]
    lanes: dict[str, str]
    passed_over: int
    left_out: tuple[BadSample, ...]


class _Shares(IterableDataset[_Share]):
    """The shares of the next steps. An error is an item too: as an exception it would come as a wall of text."""

    def __init__(self, lanes: Sequence[Lane], steps: int) -> None:
        self._lanes, self._steps = lanes, steps

    def __iter__(self) -> Iterator[_Share | UserError]:
        for _ in range(self._steps):
            try:
                # The heavy ones first: ranks take theirs side by side, and wait for each other after each.
                packs = sorted((lane.next_pack() for lane in self._lanes), key=_pack_work, reverse=True)
            except UserError as error:
                yield error
                return
            position = _position(self._lanes)
            del position["counts"]
            passed = [lane.take_passed_over() for lane in self._lanes]
            left_out = tuple(bad for _, bads in passed for bad in bads)
            yield _Share(packs, position, sum(count for count, _ in passed), left_out)


def _pack_work(pack: Sequence[dict[str, Any]]) -> float:
    return sum(map(work, pack))


def _as_it_is(item: Any) -> Any:
    return item


class Lane:
    """One pack of every step: the rows whose number leaves `lane number` when divided by the number of lanes."""

    def __init__(self, number: int, samples: Samples, spec: StreamSpec) -> None:
        """Stand before the first row."""
        self.number = number
        self._samples, self._spec = samples, spec
        self._max_patches = spec.packing_vit_patches or 2**62
        self._buffer_size = max(1, ceil(spec.shuffle_buffer_size / spec.packs_per_step))
        self._random = np.random.default_rng([spec.seed, number])
        self._buffer: list[dict[str, Any]] = []
        self._window: list[dict[str, Any]] = []
        # Of all samples ever drawn, whatever became of them: what is left in the window is a choice.
        self._drawn_work, self._drawn_tokens = 0.0, 0
        self._passed_over, self._left_out = 0, []
        self._enter(0, 0, 0)

    def next_pack(self) -> list[dict[str, Any]]:
        """Take the samples of the next pack."""
        spec = self._spec
        while len(self._window) < (PACK_WINDOW if spec.packing else 1):
            self._window.append(self._draw())
            self._drawn_work += work(self._window[-1])
            self._drawn_tokens += self._window[-1]["length"]
        taken = fill_pack(
            self._window,
            strategy=spec.packing_strategy,
            max_tokens=spec.packing_length,
            max_patches=self._max_patches,
            work_per_token=self._drawn_work / self._drawn_tokens,
        )
        pack = [self._window[place] for place in taken]
        self._window = [sample for place, sample in enumerate(self._window) if place not in taken]
        return pack

    def take_passed_over(self) -> tuple[int, list[BadSample]]:
        """How many samples were read since the last call and not used, and those of them that were so for once."""
        taken = self._passed_over, self._left_out
        self._passed_over, self._left_out = 0, []
        return taken

    def _draw(self) -> dict[str, Any]:
        """Take a random sample out of the shuffle buffer, and put the next one that is read into its place."""
        while len(self._buffer) < self._buffer_size:
            self._buffer.append(self._read())
        place = int(self._random.integers(len(self._buffer)))
        sample, self._buffer[place] = self._buffer[place], self._read()
        return sample

    def _read(self) -> dict[str, Any]:
        """Read on to the next sample that can be used."""
        visited, unusable = 0, ""
        while True:
            while self._offset == len(self._rows):
                if visited > 2 * self._samples.num_shards / min(1.0, *self._spec.weights.values()):
                    raise UserError(self._says_it_is_empty(unusable))
                visited += 1
                self._enter(self._epoch, self._shard + 1, 0)
            if not self._tokenised:
                rows = self._rows[self._offset : self._offset + TOKENISED_TOGETHER]
                self._tokenised.extend(self._tokenise(rows))
            sample = self._tokenised.popleft()
            self._offset += 1
            reason = self._why_not(sample)
            if not reason:
                return sample
            unusable = f"'{_id(sample)}': {reason}"
            self._pass_over(sample, reason)

    def _says_it_is_empty(self, unusable: str) -> str:
        packs = self._spec.packs_per_step
        why = f"can be trained on (the last of them, {unusable})" if unusable else "is there"
        return (
            f"each of the {packs} packs of a step (gradient_accumulation_steps x per_device_train_batch_size x "
            f"data_parallel_size) is made of every {packs}th sample of the stream, and of those for pack "
            f"{self.number + 1} none {why}: lower gradient_accumulation_steps, or add samples"
        )

    def _tokenise(self, rows: Sequence[int]) -> list[dict[str, Any] | Unusable]:
        samples = self._samples.samples(rows) if rows else []
        return [s if isinstance(s, Unusable) else s | {"row": row} for row, s in zip(rows, samples, strict=True)]

    def _why_not(self, sample: dict[str, Any] | Unusable) -> str:
        """Say why a sample cannot be used, or nothing when it can."""
        if isinstance(sample, Unusable):
            return sample.reason
        spec = self._spec
        if sample["length"] > spec.packing_length or sample["vit_patches"] > self._max_patches:
            reason = (
                f"its {sample['length']} tokens and {sample['vit_patches']} patches do not fit into a pack "
                f"(packing_length {spec.packing_length}, packing_vit_patches {spec.packing_vit_patches})"
            )
            if not spec.filter_overlong:
                raise UserError(
                    f"sample '{sample['sample_id']}': {reason}: raise the budget, or set filter_overlong: true to "
                    "leave such samples out"
                )
            return reason
        return "" if sample["supervised_tokens"] else "it has no token to train on"

    def _pass_over(self, sample: dict[str, Any] | Unusable, reason: str) -> None:
        """Count a sample that is not used; the first time it is met, name it too."""
        self._passed_over += 1
        row, repeated = self._rows[self._offset - 1], self._rows[self._offset - 2 : self._offset - 1]
        if [row] != repeated and _drawn_until(row, self._epoch, self._weights[row]) == 0:
            self._left_out.append(BadSample(_id(sample), 0, reason))

    def _enter(self, epoch: int, shard: int, offset: int) -> None:
        """Go to row `offset` of this lane in the `shard`-th shard of a pass; each pass has its own order of shards."""
        if shard == self._samples.num_shards:
            epoch, shard = epoch + 1, 0
        self._epoch, self._shard, self._offset = epoch, shard, offset
        order = np.random.default_rng([self._spec.seed, epoch]).permutation(self._samples.num_shards)
        start, sources = self._samples.sources(int(order[shard]))
        lanes = self._spec.packs_per_step
        places = range((self.number - start) % lanes, len(sources), lanes)
        self._weights = {start + place: self._spec.weights[sources[place]] for place in places}
        self._rows = []
        for row, weight in self._weights.items():
            self._rows += [row] * (_drawn_until(row, epoch + 1, weight) - _drawn_until(row, epoch, weight))
        self._tokenised: deque[dict[str, Any] | Unusable] = deque()

    def state(self) -> dict[str, Any]:
        """Return the position as plain values: rows by their number, no tokens and no pixels."""
        return {
            "epoch": self._epoch,
            "shard": self._shard,
            "offset": self._offset,
            "buffer": [sample["row"] for sample in self._buffer],
            "window": [sample["row"] for sample in self._window],
            "drawn": [self._drawn_work, self._drawn_tokens],
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._enter(state["epoch"], state["shard"], state["offset"])
        self._buffer = self._tokenise(state["buffer"])
        self._window = self._tokenise(state["window"])
        self._drawn_work, self._drawn_tokens = state["drawn"]
        self._random.bit_generator.state = state["random"]


def _id(sample: dict[str, Any] | Unusable) -> str:
    return sample.sample_id if isinstance(sample, Unusable) else sample["sample_id"]


def _drawn_until(row: int, epoch: int, weight: float) -> int:
    """How often the passes before `epoch` have a row: by its weight, and a fraction of 1 reaches every row in turn."""
    phase = row * 0.6180339887498949 % 1.0  # multiples of the golden ratio are spread evenly over 0..1
    return floor(epoch * weight + phase)

"""Steps without a plan: samples are read shard by shard, shuffled and packed as they come.

The stream has as many lanes as a step has packs. Each lane reads rows of its own, has its own shuffle buffer and
packer, and gives one pack to every step; rank `r` of `R` runs the lanes `r, r + R, …`. So the steps are the same on any
number of ranks, and a stream goes on exactly where it was, on any number of ranks: each lane is saved by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import ceil, floor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qvl_pipeline.engine.feed import MicroBatch, Step
from qvl_pipeline.engine.spec import StreamSpec
from qvl_pipeline.media.arrow_rows import TokenizedSamples

# Samples that a lane chooses from when it fills a pack: with 64 of log-normal lengths, packs are 99 % full.
PACK_WINDOW = 64

_COLUMNS = ("split", "source", "length", "vit_patches", "supervised_tokens")

Exchange = Callable[[Sequence[int]], list[int]]


def host_sum(copies: int) -> Exchange:
    """Make a function that sums integers over all ranks without touching a GPU.

    Args:
        copies: Ranks that hold the same values, and are to count as one: those of a sequence-parallel group.
    """
    if dist.get_world_size() == 1:
        return list
    group = dist.new_group(backend="gloo")

    def exchange(values: Sequence[int]) -> list[int]:
        sums = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(sums, group=group)
        return (sums // copies).tolist()

    return exchange


class StreamedFeed:
    """The steps of a stream, as one rank takes them."""

    def __init__(
        self,
        samples: TokenizedSamples,
        spec: StreamSpec,
        rank: int,
        world_size: int,
        packs_per_micro_batch: int,
        exchange: Exchange,
        *,
        always_vision: bool = False,
    ) -> None:
        """Stand at the beginning of the stream.

        Args:
            samples: The tokenized samples.
            spec: How they are shuffled and packed.
            rank: Data-parallel rank.
            world_size: Data-parallel ranks.
            packs_per_micro_batch: Packs in one forward pass.
            exchange: Sums integers over the data-parallel ranks. It is called once a step by all of them, while the
                step is prepared: that is how each knows the tokens of all, and in which micro-batches some rank has
                media.
            always_vision: Call the vision tower in every micro-batch.
        """
        self.max_steps = spec.max_steps
        self.tokens = self.supervised_tokens = 0
        self._spec, self._exchange, self._always_vision = spec, exchange, always_vision
        self._packs_per_micro_batch = packs_per_micro_batch
        self._micro_batches = ceil(ceil(spec.packs_per_step / world_size) / packs_per_micro_batch)
        shards = _Shards(samples)
        self._lanes = [Lane(number, shards, spec) for number in range(rank, spec.packs_per_step, world_size)]
        self._position = self._where(0, 0)

    def steps_after(self, done: int) -> Iterator[Step]:
        """Prepare the steps after `done`, one after the other, when asked for the next."""
        tokens, supervised_tokens = self.tokens, self.supervised_tokens
        for number in range(done + 1, self.max_steps + 1):
            packs = [lane.next_pack() for lane in self._lanes]
            starts = range(0, self._micro_batches * self._packs_per_micro_batch, self._packs_per_micro_batch)
            parts = [packs[start : start + self._packs_per_micro_batch] for start in starts]
            rows = [[row for pack in part for row in pack] for part in parts]
            lengths, supervised = (sum(row[fact] for part in rows for row in part) for fact in (1, 3))
            here = [lengths, supervised, *(sum(row[2] for row in part) for part in rows)]
            step_tokens, step_supervised, *vision = self._exchange(here)
            tokens += step_tokens
            supervised_tokens += step_supervised
            yield Step(
                number=number,
                micro_batches=tuple(
                    MicroBatch(tuple(row[0] for row in part), self._always_vision or bool(media))
                    for part, media in zip(rows, vision, strict=True)
                ),
                packs=self._spec.packs_per_step,
                tokens=step_tokens,
                supervised_tokens=step_supervised,
                epoch=tokens / self._spec.tokens_per_epoch,
                position=self._where(tokens, supervised_tokens),
            )

    def _where(self, tokens: int, supervised_tokens: int) -> dict[str, str]:
        lanes = {f"lane{lane.number}": json.dumps(lane.state()) for lane in self._lanes}
        return {"tokens": json.dumps([tokens, supervised_tokens])} | lanes

    def finish(self, step: Step) -> None:
        """Move on to the position after `step`; steps that are prepared ahead do not count."""
        self._position = step.position
        self.tokens += step.tokens
        self.supervised_tokens += step.supervised_tokens

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last finished step: that of each lane of this rank, by the lane's name."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position; `state_dict` has the lanes of this rank, whichever ranks saved them."""
        self._position = dict(state_dict)
        self.tokens, self.supervised_tokens = json.loads(state_dict["tokens"])
        for lane in self._lanes:
            lane.restore(json.loads(state_dict[f"lane{lane.number}"]))


class _Shards:
    """The rows of each shard that can be trained on; lanes read the same shards at about the same time."""

    def __init__(self, samples: TokenizedSamples) -> None:
        self._samples = samples
        self.count = samples.num_shards
        self.read = lru_cache(maxsize=8)(self._read)

    def _read(self, number: int) -> tuple[int, list[tuple[Any, ...]]]:
        return self._samples.shard(number, _COLUMNS)

    def facts(self, row: int) -> _Row:
        found = self._samples.row(row)
        return row, found["length"], found["vit_patches"], found["supervised_tokens"]


# Row of `tokenized_samples`, tokens, vision patches, supervised tokens.
_Row = tuple[int, int, int, int]


class Lane:
    """One pack of every step: the rows whose number leaves `lane number` when divided by the number of lanes."""

    def __init__(self, number: int, shards: _Shards, spec: StreamSpec) -> None:
        """Stand before the first row."""
        self.number = number
        self._shards, self._spec = shards, spec
        self._max_patches = spec.packing_vit_patches or 2**62
        self._buffer_size = max(1, ceil(spec.shuffle_buffer_size / spec.packs_per_step))
        self._random = np.random.default_rng([spec.seed, number])
        self._buffer: list[_Row] = []
        self._window: list[_Row] = []
        self._enter(0, 0, 0)

    def next_pack(self) -> list[_Row]:
        """Take the samples of the next pack.

        The one that waited longest comes first, so none waits for ever. Then those that fit: for `best_fit` the largest
        first, for `first_fit` in their order.
        """
        spec = self._spec
        while len(self._window) < (PACK_WINDOW if spec.packing else 1):
            self._window.append(self._draw())
        order = list(range(len(self._window)))
        if spec.packing_strategy == "best_fit":
            order[1:] = sorted(order[1:], key=lambda place: -self._size(self._window[place]))
        taken: set[int] = set()
        tokens = patches = 0
        for place in order:
            _, length, cost, _ = self._window[place]
            if tokens + length <= spec.packing_length and patches + cost <= self._max_patches:
                taken.add(place)
                tokens, patches = tokens + length, patches + cost
        pack = [self._window[place] for place in sorted(taken)]
        self._window = [row for place, row in enumerate(self._window) if place not in taken]
        return pack

    def _size(self, row: _Row) -> float:
        return max(row[1] / self._spec.packing_length, row[2] / self._max_patches)

    def _draw(self) -> _Row:
        """Take a random row out of the shuffle buffer, and put the next one that is read into its place."""
        while len(self._buffer) < self._buffer_size:
            self._buffer.append(self._read())
        place = int(self._random.integers(len(self._buffer)))
        row, self._buffer[place] = self._buffer[place], self._read()
        return row

    def _read(self) -> _Row:
        visited = 0
        while self._offset == len(self._rows):
            if visited > 2 * self._shards.count / min(1.0, *self._spec.weights.values()):
                raise ValueError(
                    f"the stream has no sample for pack {self.number} of a step: there are fewer samples to train on "
                    f"than packs per step ({self._spec.packs_per_step}); lower gradient_accumulation_steps"
                )
            visited += 1
            self._enter(self._epoch, self._shard + 1, 0)
        self._offset += 1
        return self._rows[self._offset - 1]

    def _enter(self, epoch: int, shard: int, offset: int) -> None:
        """Go to row `offset` of this lane in the `shard`-th shard of a pass; each pass has its own order of shards."""
        if shard == self._shards.count:
            epoch, shard = epoch + 1, 0
        self._epoch, self._shard, self._offset = epoch, shard, offset
        order = np.random.default_rng([self._spec.seed, epoch]).permutation(self._shards.count)
        start, values = self._shards.read(int(order[shard]))
        spec, lanes = self._spec, self._spec.packs_per_step
        self._rows = []
        for place in range((self.number - start) % lanes, len(values), lanes):
            split, source, *facts = values[place]
            too_long = facts[0] > spec.packing_length or facts[1] > self._max_patches
            if split == "train" and not too_long:
                row = (start + place, *facts)
                self._rows += [row] * _repetitions(row[0], epoch, spec.weights[source])

    def state(self) -> dict[str, Any]:
        """Return the position as plain values: rows by their number, no tokens and no pixels."""
        return {
            "epoch": self._epoch,
            "shard": self._shard,
            "offset": self._offset,
            "buffer": [row[0] for row in self._buffer],
            "window": [row[0] for row in self._window],
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._enter(state["epoch"], state["shard"], state["offset"])
        self._buffer = [self._shards.facts(row) for row in state["buffer"]]
        self._window = [self._shards.facts(row) for row in state["window"]]
        self._random.bit_generator.state = state["random"]


def _repetitions(row: int, epoch: int, weight: float) -> int:
    """How often a pass has a row: the weight on average, and a fraction of 1 reaches every row in turn."""
    phase = row * 0.6180339887498949 % 1.0  # multiples of the golden ratio are spread evenly over 0..1
    return floor((epoch + 1) * weight + phase) - floor(epoch * weight + phase)

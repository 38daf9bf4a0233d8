"""Best-fit-decreasing over a whole epoch: the fullest packs."""

from __future__ import annotations

from array import array
from collections import defaultdict
from heapq import heappop, heappush, heapreplace
from math import ceil

import numpy as np

from qvl_pipeline.data.plan.packing.packs import Packs

# Samples are sorted by size up to this relative noise. It makes packs differ from epoch to epoch and mixes sizes in
# them: samples of one size are often of one kind, and a step on packs of one kind learns one thing. Small samples fill
# what large ones leave, so that it costs no fill, or one percent where most samples take a tenth of a pack or more.
SIZE_NOISE = 0.5
# Groups of equal samples that are placed one after another; what bounds the time of packing tens of millions.
MOST_GROUPS = 200_000
# Vision patches are counted in units of this fraction of their budget, rounded up: samples of almost the same size are
# then of the same size, and are packed together.
PATCH_UNITS = 4096


def best_fit(
    lengths: np.ndarray, patches: np.ndarray, *, max_tokens: int, max_patches: int | None, rng: np.random.Generator
) -> Packs:
    """Pack by best-fit-decreasing: the largest samples first, each into the fullest pack that still holds it.

    The fullest pack is the one with the fewest tokens left; among equals, the one with the most patches left. It is
    found in O(log max_tokens) by a binary tree over the tokens left. Of more than `MOST_GROUPS` samples, several of one
    size are placed in one go, and packs that hold the same are filled in one go, which bounds the effort.

    Args:
        lengths: Tokens of each sample `[N]`, none above `max_tokens`.
        patches: Vision patches of each sample `[N]`, none above `max_patches`.
        max_tokens: Token budget of a pack.
        max_patches: Patch budget of a pack, or `None`.
        rng: Source of the noise that makes every epoch different.

    Returns:
        The packs; samples are in the order in which a pack was filled.
    """
    if not len(lengths):
        return Packs(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    units, budget = _patch_units(lengths, patches, max_tokens, max_patches)
    samples, sizes, counts = _by_size(lengths, units, max_tokens, budget, rng)
    open_packs = _OpenPacks(max_tokens, budget)
    for (length, cost), count in zip(sizes.tolist(), counts.tolist(), strict=True):
        open_packs.place(length, cost, count)
    return Packs.from_numbers(samples, open_packs.numbers())


def _patch_units(
    lengths: np.ndarray, patches: np.ndarray, max_tokens: int, max_patches: int | None
) -> tuple[np.ndarray, int]:
    """Patches of each sample and their budget in coarser units; all zero when the budget can never be reached."""
    if max_patches is None or (patches / lengths).max() * max_tokens <= max_patches:
        return np.zeros_like(lengths), 0
    unit = max(1, max_patches // PATCH_UNITS)
    budget = max_patches // unit
    return np.minimum(-(-patches // unit), budget), budget


def _by_size(
    lengths: np.ndarray, units: np.ndarray, max_tokens: int, budget: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort samples by size: the samples `[N]`, the sizes (tokens, patches) `[G, 2]` of groups, and how many each has.

    Samples of one size are in random order. Each is moved up or down by a noise of its own, so that packs mix samples
    of like size, which are often of one kind; only of very many do some of one size move together.
    """
    keys = lengths.astype(np.int64) * (budget + 1) + units
    samples = rng.permutation(len(keys))
    samples = samples[np.argsort(keys[samples], kind="stable")]
    keys = keys[samples]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(keys)) + 1])
    nth = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    starts = np.flatnonzero(nth % ceil(len(keys) / MOST_GROUPS) == 0)
    counts = np.diff(starts, append=len(keys))
    sizes = np.stack(np.divmod(keys[starts], budget + 1), axis=1)
    noise = rng.uniform(1 - SIZE_NOISE, 1 + SIZE_NOISE, size=len(sizes))
    largest_first = -(sizes / [max_tokens, max(1, budget)]).max(axis=1) * noise
    # Text comes last: it also fits where no patches are left.
    rank = np.lexsort([largest_first, sizes[:, 1] == 0])
    return Packs(samples, np.append(starts, len(keys))).take(rank).samples, sizes[rank], counts[rank]


class _OpenPacks:
    """Packs by what they have left, and the record of what was put into which."""

    def __init__(self, max_tokens: int, max_patches: int) -> None:
        self._budgets = (max_tokens, max_patches)
        self._tree = _MostPatches(max_tokens)
        # Tokens left -> heap of (-patches left, first pack, end): ranges of packs that are filled alike.
        self._ranges: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self._opened = 0
        self._first, self._packs, self._each = array("q"), array("q"), array("q")

    def place(self, length: int, cost: int, count: int) -> None:
        """Place samples of one size.

        A pack that took one takes the next as well, as long as it has room: it has become the fullest that holds it.
        """
        while count:
            tokens_left = self._tree.find(length, cost)
            if tokens_left is None:
                tokens_left, patches_left = self._budgets
                fitting = min(tokens_left // length, patches_left // cost if cost else count, count)
                first, packs = self._opened, count // fitting
                self._opened += packs
            else:
                ranges = self._ranges[tokens_left]
                negative, first, end = ranges[0]
                patches_left = -negative
                fitting = min(tokens_left // length, patches_left // cost if cost else count, count)
                packs = min(end - first, count // fitting)
                if packs == end - first:
                    heappop(ranges)
                    self._tree.set(tokens_left, -ranges[0][0] if ranges else -1)
                else:
                    heapreplace(ranges, (negative, first + packs, end))
            self._first.append(first)
            self._packs.append(packs)
            self._each.append(fitting)
            count -= packs * fitting
            self._open(tokens_left - fitting * length, patches_left - fitting * cost, first, packs)

    def _open(self, tokens_left: int, patches_left: int, first: int, packs: int) -> None:
        if tokens_left:
            ranges = self._ranges[tokens_left]
            heappush(ranges, (-patches_left, first, first + packs))
            self._tree.set(tokens_left, -ranges[0][0])

    def numbers(self) -> np.ndarray:
        """Pack of each sample `[N]`, in the order in which they were placed."""
        first, packs, each = (np.asarray(values) for values in (self._first, self._packs, self._each))
        ends = np.cumsum(packs)
        number = np.arange(ends[-1]) + np.repeat(first - (ends - packs), packs)
        return np.repeat(number, np.repeat(each, packs))


class _MostPatches:
    """For each number of tokens left, the most patches that a pack with as many tokens has left; -1 without a pack.

    A binary tree in a list: node i has the children 2i and 2i + 1 and holds the larger of their values.
    """

    def __init__(self, max_tokens: int) -> None:
        self._leaves = 1 << max_tokens.bit_length()
        self._values = [-1] * (2 * self._leaves)

    def set(self, tokens: int, patches: int) -> None:
        values, node = self._values, tokens + self._leaves
        values[node] = patches
        while node > 1:
            other = values[node ^ 1]
            patches, node = patches if patches > other else other, node // 2
            if values[node] == patches:
                break
            values[node] = patches

    def find(self, tokens: int, patches: int) -> int | None:
        """Smallest number of tokens, at least `tokens`, left in a pack that has `patches` left."""
        values, node = self._values, tokens + self._leaves
        while values[node] < patches:  # climb until a node to the right has them
            while node % 2:
                node //= 2
            if not node:
                return None
            node += 1
        while node < self._leaves:
            node *= 2
            if values[node] < patches:
                node += 1
        return node - self._leaves

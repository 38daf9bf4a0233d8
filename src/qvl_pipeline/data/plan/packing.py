"""Which samples share a pack: bin packing within two budgets, tokens and vision patches. No sample is ever split."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from math import ceil

import numpy as np

from qvl_pipeline.tokens.work import work_of

# Samples are sorted by size up to this relative noise. It makes packs differ from epoch to epoch and mixes sizes in
# them: samples of one size are often of one kind, and a step on packs of one kind learns one thing. Small samples fill
# what large ones leave, so that it costs no fill, or one percent where most samples take a tenth of a pack or more.
SIZE_NOISE = 0.5
# `balanced` spreads samples over packs in the order of their work, which must not be that wrong.
BALANCED_NOISE = 0.1
# Groups of equal samples that are placed one after another; what bounds the time of packing tens of millions.
MOST_GROUPS = 200_000
# Vision patches are counted in units of this fraction of their budget, rounded up: samples of almost the same size are
# then of the same size, and are packed together.
PATCH_UNITS = 4096
# How full `balanced` means its packs to be on average: the room that is left is what they are balanced with. More room
# than this evens out little more (benchmarks/packing.py).
BALANCED_FILL = 0.995


@dataclass(frozen=True)
class Packs:
    """A partition of samples.

    Attributes:
        samples: Positions of the samples, pack by pack `[N]`.
        bounds: Where each pack begins in `samples`, and the end of the last one `[P + 1]`.
    """

    samples: np.ndarray
    bounds: np.ndarray

    @classmethod
    def from_numbers(cls, samples: np.ndarray, numbers: np.ndarray) -> Packs:
        """Gather samples by the number of their pack; packs are numbered without a gap, samples keep their order."""
        order = np.argsort(numbers, kind="stable")
        return cls(samples[order], np.concatenate([[0], np.cumsum(np.bincount(numbers))]))

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the samples of each pack."""
        return (self.samples[start:end] for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True))

    def take(self, numbers: np.ndarray) -> Packs:
        """Return the packs of the given numbers, in that order."""
        sizes = np.diff(self.bounds)[numbers]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(self.bounds[numbers] - bounds[:-1], sizes)
        return Packs(self.samples[np.arange(bounds[-1]) + shift], bounds)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum a value of the samples over each pack `[P]`; integers are summed as int64."""
        dtype = np.int64 if np.issubdtype(values.dtype, np.integer) else np.float64
        totals = np.concatenate([np.zeros(1, dtype), np.cumsum(values[self.samples], dtype=dtype)])
        return totals[self.bounds[1:]] - totals[self.bounds[:-1]]


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


def first_fit(
    lengths: np.ndarray, patches: np.ndarray, *, max_tokens: int, max_patches: int | None, rng: np.random.Generator
) -> Packs:
    """Pack by first fit in shuffled order: each sample goes into the first pack that still holds it.

    Done pack by pack, which gives the same: the first pack takes, in order, every sample that still fits when its turn
    comes, the second one does so among the others, and so on.

    Args:
        lengths: Tokens of each sample `[N]`, none above `max_tokens`.
        patches: Vision patches of each sample `[N]`, none above `max_patches`.
        max_tokens: Token budget of a pack.
        max_patches: Patch budget of a pack, or `None`.
        rng: Source of the order.

    Returns:
        The packs; samples are in the order in which a pack was filled.
    """
    order = rng.permutation(len(lengths))
    budget = int(patches.sum()) if max_patches is None else max_patches
    waiting = _Waiting(lengths[order], patches[order], max_tokens, budget)
    taken, bounds = array("q"), array("q", [0])
    while len(taken) < len(order):
        tokens_left, patches_left, position = max_tokens, budget, 0
        while (found := waiting.take(position, tokens_left, patches_left)) is not None:
            position, length, cost = found
            tokens_left -= length
            patches_left -= cost
            taken.append(position)
        bounds.append(len(taken))
    return Packs(order[np.asarray(taken)], np.asarray(bounds)) if len(order) else Packs(order, np.zeros(1, np.int64))


class _Waiting:
    """Samples in their order, in a binary tree that knows the least of every stretch of them.

    The least of what: tokens, patches, and both together as shares of their budgets. A stretch may have its shortest
    sample and the one of the fewest patches in two places; the sum tells, in most cases, that neither fits.
    """

    def __init__(self, lengths: np.ndarray, patches: np.ndarray, max_tokens: int, max_patches: int) -> None:
        self._budgets = (max_tokens, max_patches)
        self._leaves = 1 << max(1, (len(lengths) - 1).bit_length())
        together = lengths.astype(np.int64) * max_patches + patches.astype(np.int64) * max_tokens
        # Node i has the children 2i and 2i + 1.
        self._least = [_tree(values, self._leaves) for values in (lengths, patches, together)]

    def take(self, position: int, tokens: int, patches: int) -> tuple[int, int, int] | None:
        """Take out the first sample from `position` on that fits; return its position, length and patches."""
        lengths, costs, sums = self._least
        together = tokens * self._budgets[1] + patches * self._budgets[0]
        node = position + self._leaves
        while True:
            if lengths[node] <= tokens and costs[node] <= patches and sums[node] <= together:
                if node >= self._leaves:
                    break
                node *= 2
                continue
            node += 1
            while not node % 2:
                node //= 2
            if node == 1:
                return None
        found = node - self._leaves, lengths[node], costs[node]
        self._remove(node)
        return found

    def _remove(self, leaf: int) -> None:
        for values in self._least:
            node, least = leaf, _ABSENT
            values[leaf] = _ABSENT
            while node > 1:
                other = values[node ^ 1]
                least, node = least if least < other else other, node // 2
                if values[node] == least:
                    break
                values[node] = least


_ABSENT = 2**62


def _tree(values: np.ndarray, leaves: int) -> list[int]:
    level = np.full(leaves, _ABSENT, dtype=np.int64)
    level[: len(values)] = values
    levels = [level]
    while len(levels[-1]) > 1:
        levels.append(levels[-1].reshape(-1, 2).min(axis=1))
    return np.concatenate([[0], *levels[::-1]]).tolist()


def balanced(
    lengths: np.ndarray, patches: np.ndarray, *, max_tokens: int, max_patches: int | None, rng: np.random.Generator
) -> Packs:
    """Pack for equal work: the largest samples first, each into the pack with the least work that still holds it.

    This is the longest-processing-time rule of scheduling. Work is that of the language model, with its quadratic
    attention, and of the vision tower together. Packs are less full than those of `best_fit`.

    Args:
        lengths: Tokens of each sample `[N]`, none above `max_tokens`.
        patches: Vision patches of each sample `[N]`, none above `max_patches`.
        max_tokens: Token budget of a pack.
        max_patches: Patch budget of a pack, or `None`.
        rng: Source of the noise that makes every epoch different.

    Returns:
        The packs; samples are in the order in which a pack was filled.
    """
    budget = int(patches.sum()) + 1 if max_patches is None else max_patches
    work = work_of(lengths, patches)
    # Without a patch budget, all patches fit into one pack, and no room beside them is needed.
    filled = [lengths.sum() / max_tokens, *([] if max_patches is None else [patches.sum() / max_patches])]
    fewest = max(filled) / BALANCED_FILL
    packs = [(0.0, number, max_tokens, budget) for number in range(int(np.ceil(fewest)))]
    noisy = np.maximum(lengths / max_tokens, patches / budget)
    noisy = noisy * rng.uniform(1 - BALANCED_NOISE, 1 + BALANCED_NOISE, size=len(lengths))
    placed, numbers = array("q"), array("q")
    # Text comes last: it also fits where no patches are left.
    for chosen in (patches > 0, patches == 0):
        samples = np.flatnonzero(chosen)
        samples = samples[np.argsort(-noisy[samples], kind="stable")]
        items = zip(samples.tolist(), *(values[samples].tolist() for values in (lengths, patches, work)), strict=True)
        packs = _place_by_work(items, packs, (max_tokens, budget), placed, numbers)
    _, numbering = np.unique(np.asarray(numbers), return_inverse=True)
    if not len(placed):
        return Packs(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    return Packs.from_numbers(np.asarray(placed), numbering)


# Work, number, tokens left, patches left.
_Load = tuple[float, int, int, int]


def _place_by_work(
    items: Iterator[tuple[int, int, int, float]],
    packs: list[_Load],
    budgets: tuple[int, int],
    placed: array,
    numbers: array,
) -> list[_Load]:
    """Place samples (position, tokens, patches, work), all with patches or all without; return the packs after it."""
    max_tokens, max_patches = budgets
    heapify(packs)
    full: list[tuple[float, _Load]] = []  # had no room for a larger sample; by how large a sample they surely hold
    opened = len(packs)
    for sample, length, cost, work in items:
        size = max(length / max_tokens, cost / max_patches)
        while full and -full[0][0] >= size:
            heappush(packs, heappop(full)[1])
        while packs and (packs[0][2] < length or packs[0][3] < cost):
            pack = heappop(packs)
            room = pack[2] / max_tokens if not cost else min(pack[2] / max_tokens, pack[3] / max_patches)
            heappush(full, (-room, pack))
        if not packs:
            packs.append((0.0, opened, max_tokens, max_patches))
            opened += 1
        load, number, tokens_left, patches_left = packs[0]
        heapreplace(packs, (load + work, number, tokens_left - length, patches_left - cost))
        placed.append(sample)
        numbers.append(number)
    return packs + [pack for _, pack in full]


def one_each(
    lengths: np.ndarray, *, group_by_length: bool, group: int, rng: np.random.Generator, begun: int = 0
) -> Packs:
    """Make every sample its own pack, in shuffled order.

    Args:
        lengths: Tokens of each sample `[N]`.
        group_by_length: Put samples of similar length into the same `group` of consecutive packs; the groups themselves
            are in random order.
        group: Packs that belong together (an optimizer step).
        rng: Source of the order.
        begun: Packs that come before these. Where they end inside of a group, it is with their longest samples; the
            longest of these complete it.

    Returns:
        Packs of one position in `lengths` each.
    """
    order = rng.permutation(len(lengths))
    if group_by_length:
        # The shuffle before the stable sort decides among samples of equal length.
        order = order[np.argsort(lengths[order], kind="stable")]
        rest, completing = np.split(order, [max(0, len(order) - -begun % group)])
        groups = [rest[start : start + group] for start in range(0, len(rest), group)]
        # The last, smaller group stays last, so that all the others stay whole.
        whole = [groups[number] for number in rng.permutation(max(0, len(groups) - 1))]
        order = np.concatenate([completing, *whole, *groups[-1:]])
    return Packs(order, np.arange(len(order) + 1))

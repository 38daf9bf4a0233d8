"""Packs of equal work, so that ranks wait less for each other."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from qvl_pipeline.data.plan.packing.packs import Packs
from qvl_pipeline.tokens.work import work_of

# `balanced` spreads samples over packs in the order of their work, which must not be that wrong.
BALANCED_NOISE = 0.1
# How full `balanced` means its packs to be on average: the room that is left is what they are balanced with. More room
# than this evens out little more (benchmarks/packing.py).
BALANCED_FILL = 0.995


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

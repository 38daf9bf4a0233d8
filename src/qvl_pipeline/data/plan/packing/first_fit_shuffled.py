"""First fit in shuffled order."""

from __future__ import annotations

from array import array

import numpy as np

from qvl_pipeline.data.plan.packing.packs import Packs

_ABSENT = 2**62


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


def _tree(values: np.ndarray, leaves: int) -> list[int]:
    level = np.full(leaves, _ABSENT, dtype=np.int64)
    level[: len(values)] = values
    levels = [level]
    while len(levels[-1]) > 1:
        levels.append(levels[-1].reshape(-1, 2).min(axis=1))
    return np.concatenate([[0], *levels[::-1]]).tolist()

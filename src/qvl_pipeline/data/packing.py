"""Which samples share a pack: bin packing within two budgets, tokens and vision patches. No sample is ever split."""

from __future__ import annotations

from collections import defaultdict
from heapq import heappop, heappush

import numpy as np

# `best_fit` sorts by size up to this relative noise: packs then differ from epoch to epoch, at no loss of fill.
SIZE_NOISE = 0.1

Pack = list[int]


def best_fit(
    lengths: np.ndarray, patches: np.ndarray, *, max_tokens: int, max_patches: int | None, rng: np.random.Generator
) -> list[Pack]:
    """Pack by best-fit-decreasing: the largest samples first, each into the fullest pack that still holds it.

    The fullest pack is the one with the fewest tokens left; among equals, the one with the most patches left. It is
    found in O(log max_tokens) by a binary tree over the tokens left.

    Args:
        lengths: Tokens of each sample `[N]`, none above `max_tokens`.
        patches: Vision patches of each sample `[N]`, none above `max_patches`.
        max_tokens: Token budget of a pack.
        max_patches: Patch budget of a pack, or `None`.
        rng: Source of the noise that makes every epoch different.

    Returns:
        Packs of positions in `lengths`, each in the order in which it was filled.
    """
    patch_budget = int(patches.sum()) + 1 if max_patches is None else max_patches
    noise = rng.uniform(1 - SIZE_NOISE, 1 + SIZE_NOISE, size=len(lengths))
    sizes = np.maximum(lengths / max_tokens, patches / patch_budget) * noise
    packs: list[Pack] = []
    tree = _MostPatches(max_tokens)
    open_packs: dict[int, list[tuple[int, int]]] = defaultdict(list)  # tokens left -> heap of (-patches left, pack)
    for sample in np.argsort(-sizes, kind="stable").tolist():
        length, cost = int(lengths[sample]), int(patches[sample])
        tokens_left = tree.find(length, cost)
        if tokens_left is None:
            tokens_left, patches_left, pack = max_tokens, patch_budget, len(packs)
            packs.append([])
        else:
            negative, pack = heappop(open_packs[tokens_left])
            patches_left = -negative
            tree.set(tokens_left, -open_packs[tokens_left][0][0] if open_packs[tokens_left] else -1)
        packs[pack].append(sample)
        tokens_left -= length
        heappush(open_packs[tokens_left], (cost - patches_left, pack))
        tree.set(tokens_left, -open_packs[tokens_left][0][0])
    return packs


class _MostPatches:
    """For each number of tokens left, the most patches that a pack with as many tokens has left; -1 without a pack.

    A binary tree in a list: node i has the children 2i and 2i + 1 and holds the larger of their values.
    """

    def __init__(self, max_tokens: int) -> None:
        self._leaves = 1 << max_tokens.bit_length()
        self._values = [-1] * (2 * self._leaves)

    def set(self, tokens: int, patches: int) -> None:
        node = tokens + self._leaves
        self._values[node] = patches
        while node := node // 2:
            self._values[node] = max(self._values[2 * node], self._values[2 * node + 1])

    def find(self, tokens: int, patches: int) -> int | None:
        """Smallest number of tokens, at least `tokens`, left in a pack that has `patches` left."""
        node = tokens + self._leaves
        while self._values[node] < patches:  # climb until a node to the right has them
            while node % 2:
                node //= 2
            if not node:
                return None
            node += 1
        while node < self._leaves:
            node = 2 * node if self._values[2 * node] >= patches else 2 * node + 1
        return node - self._leaves


def first_fit(
    lengths: np.ndarray, patches: np.ndarray, *, max_tokens: int, max_patches: int | None, rng: np.random.Generator
) -> list[Pack]:
    """Pack by first fit in shuffled order: each sample goes into the first pack that still holds it.

    A binary tree over the packs, with the most room left below each node, finds that pack in O(log n).

    Args:
        lengths: Tokens of each sample `[N]`, none above `max_tokens`.
        patches: Vision patches of each sample `[N]`, none above `max_patches`.
        max_tokens: Token budget of a pack.
        max_patches: Patch budget of a pack, or `None`.
        rng: Source of the order.

    Returns:
        Packs of positions in `lengths`, each in the order in which it was filled.
    """
    leaves = 1 << max(1, (len(lengths) - 1).bit_length())
    tokens_left = [max_tokens] * (2 * leaves)  # node i has the children 2i and 2i + 1
    patches_left = [float("inf") if max_patches is None else max_patches] * (2 * leaves)

    def find(node: int, length: int, cost: int) -> int | None:
        if tokens_left[node] < length or patches_left[node] < cost:
            return None
        if node >= leaves:
            return node
        # A node may have room for the tokens in one child and for the patches in the other, hence the second look.
        leaf = find(2 * node, length, cost)
        return find(2 * node + 1, length, cost) if leaf is None else leaf

    packs: list[Pack] = [[] for _ in range(len(lengths))]
    for sample in rng.permutation(len(lengths)).tolist():
        length, cost = int(lengths[sample]), int(patches[sample])
        node = find(1, length, cost)
        packs[node - leaves].append(sample)
        tokens_left[node] -= length
        patches_left[node] -= cost
        while node := node // 2:
            tokens_left[node] = max(tokens_left[2 * node], tokens_left[2 * node + 1])
            patches_left[node] = max(patches_left[2 * node], patches_left[2 * node + 1])
    return [pack for pack in packs if pack]


def one_each(lengths: np.ndarray, *, group_by_length: bool, group: int, rng: np.random.Generator) -> list[Pack]:
    """Make every sample its own pack, in shuffled order.

    Args:
        lengths: Tokens of each sample `[N]`.
        group_by_length: Put samples of similar length into the same `group` of consecutive packs; the groups themselves
            are in random order.
        group: Packs that belong together (an optimizer step).
        rng: Source of the order.

    Returns:
        Packs of one position in `lengths` each.
    """
    order = rng.permutation(len(lengths))
    if group_by_length and len(order) > group:
        # The shuffle before the stable sort decides among samples of equal length.
        order = order[np.argsort(lengths[order], kind="stable")]
        groups = [order[start : start + group] for start in range(0, len(order), group)]
        # The last, smaller group stays last, so that all the others stay whole.
        whole = [groups[number] for number in rng.permutation(len(groups) - 1)]
        order = np.concatenate([*whole, groups[-1]])
    return [[sample] for sample in order.tolist()]

"""Which of the samples that wait go into the next pack of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qvl_pipeline.tokens.work import work_of

# Samples that a pack is chosen from: with 64 of log-normal lengths, packs are 99 % full.
PACK_WINDOW = 64


def work(sample: Mapping[str, Any]) -> float:
    """Work of a sample, in tokens of the language model."""
    return work_of(sample["length"], sample["vit_patches"])


def fill_pack(
    waiting: Sequence[Mapping[str, Any]], *, strategy: str, max_tokens: int, max_patches: int, work_per_token: float
) -> list[int]:
    """Choose the samples of a pack.

    The one that waited longest comes first, so none waits for ever. Then those that fit: for `first_fit` in their
    order, for `best_fit` the largest first. For `balanced`, those whose work is furthest from what is usual for their
    tokens come first, and while a pack has too little work it takes samples that have much, and the other way round: so
    packs that other ranks fill from other samples, at the same time, weigh the same.

    Args:
        waiting: Samples with their `length` and `vit_patches`, none above a budget, in the order in which they came.
        strategy: `first_fit`, `best_fit` or `balanced`.
        max_tokens: Token budget of the pack.
        max_patches: Patch budget of the pack.
        work_per_token: What is usual in this stream.

    Returns:
        Their places in `waiting`, ascending.
    """
    surplus = [work(sample) - work_per_token * sample["length"] for sample in waiting]

    def size(place: int) -> float:
        sample = waiting[place]
        return max(sample["length"] / max_tokens, sample["vit_patches"] / max_patches)

    first = {"first_fit": lambda place: place, "best_fit": size, "balanced": lambda place: abs(surplus[place])}
    rest = sorted(range(1, len(waiting)), key=first[strategy], reverse=strategy != "first_fit")
    left, taken = [0, *rest], []
    tokens = patches = 0
    balance = 0.0
    while left := [
        place
        for place in left
        if tokens + waiting[place]["length"] <= max_tokens and patches + waiting[place]["vit_patches"] <= max_patches
    ]:
        place = left[0]
        if strategy == "balanced" and taken:
            place = next((place for place in left if (surplus[place] > 0) == (balance < 0)), place)
        left.remove(place)
        taken.append(place)
        balance += surplus[place]
        tokens, patches = tokens + waiting[place]["length"], patches + waiting[place]["vit_patches"]
    return sorted(taken)

"""Sequences of a pack that are (nearly) equally long, as one batch of rows: one call a length, not one a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class EqualLengths:
    """Sequences computed as one batch of rows.

    Attributes:
        length: Tokens of a row.
        gather: Tokens of the pack that the rows consist of, one row after the other.
        keep: Which of these are no filling.
    """

    length: int
    gather: Tensor
    keep: Tensor


@lru_cache(maxsize=8)  # every layer of a tower asks for the same; a pack has at most four kinds of bounds and rounding
def equal_lengths(
    bounds: tuple[int, ...], round_up: Callable[[int], int] | None, device: torch.device
) -> tuple[list[EqualLengths], Tensor | None]:
    """Group the sequences of a pack by length.

    Args:
        bounds: Where each sequence begins, and where the last one ends.
        round_up: Length to which a sequence may be filled up, with whatever tokens follow it: only for what looks back,
            never ahead. `None` groups sequences of exactly one length.
        device: Where the pack is.

    Returns:
        The batches, and the order that brings their tokens back into that of the pack: `None` if they are in it.
    """
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(bounds):
        length = end - start
        by_length.setdefault(round_up(length) if round_up else length, []).append((start, end))
    batches, tokens = [], []
    for length, sequences in by_length.items():
        starts, ends = torch.tensor(sequences).T
        index = starts[:, None] + torch.arange(length)
        real = index < ends[:, None]
        gather, keep = index.clamp(max=bounds[-1] - 1).flatten(), real.flatten().nonzero()[:, 0]
        batches.append(EqualLengths(length, gather.to(device), keep.to(device)))
        tokens.append(index[real])
    in_order = len(batches) == 1 and not round_up
    return batches, None if in_order else torch.cat(tokens).argsort().to(device)


def eighths(length: int) -> int:
    """Round a length up to a multiple of an eighth of the power of two above it, so that at most 1/8 is wasted."""
    step = max(8, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step

"""Packs as a partition of samples, and the plainest one: every sample a pack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


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

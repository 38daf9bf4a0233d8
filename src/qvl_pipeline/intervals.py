"""Mean scores with their 95 % intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """Mean score of `n` answers, with the bounds of its 95 % interval; a share of right answers for most metrics."""

    rate: float
    n: int
    low: float
    high: float


def score(rate: float, scores: np.ndarray) -> Score:
    """Return mean and interval of the scores `[N]`: Wilson's where answers are right or wrong, else by bootstrap."""
    binary = np.isin(scores, (0.0, 1.0)).all()
    low, high = wilson_interval(rate, len(scores)) if binary else bootstrap_interval(scores)
    return Score(rate, len(scores), low, high)


def wilson_interval(rate: float, n: int) -> tuple[float, float]:
    """Give the 95 % score interval of a binomial share (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212).

    Unlike the normal approximation it stays inside 0 to 1, and has a width at 0 % and 100 %.

    Args:
        rate: Observed share.
        n: Number of trials, at least 1.

    Returns:
        Lower and upper bound.
    """
    z = 1.959964  # 97.5 % quantile of the normal distribution
    centre = rate + z**2 / (2 * n)
    half_width = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def bootstrap_interval(scores: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """Give the 95 % percentile interval of a mean (Efron and Tibshirani 1993), the same for the same scores.

    Args:
        scores: Scores `[N]`.
        resamples: Samples drawn with replacement.

    Returns:
        Lower and upper bound.
    """
    rng = np.random.default_rng(0)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)

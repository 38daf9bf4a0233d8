"""What all low-rank updates of a model have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """What all adapted layers of a model have in common.

    Attributes:
        r: Rank of the update.
        scaling: Factor on the update.
        dropout: Share of the inputs of the update that are dropped in training.
        dora: The rows of the adapted matrix have a trained length of their own.
        pissa: The update starts at the principal part of the matrix, and what it started at is subtracted again.
    """

    r: int
    scaling: float
    dropout: float = 0.0
    dora: bool = False
    pissa: bool = False


def scaling_of(alpha: float, r: int, *, rslora: bool) -> float:
    """Factor on the update: `alpha / r` (Hu et al. 2021), or `alpha / sqrt(r)` (Kalajdzievski 2023, rsLoRA)."""
    return alpha / (math.sqrt(r) if rslora else r)

"""Kinds of samples in a table of predictions, and which of its rows a kind stands for.

A benchmark's rows have kinds of their own, `benchmark/<source>` or `benchmark/<source>/<group>`, and count in no other:
`overall` stays the mean over the own eval split, whatever is measured beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rows of sources are read without it
    import pandas as pd

OVERALL = "overall"
BENCHMARK = "benchmark/"


def kinds_in(table: pd.DataFrame) -> list[str]:
    """Return the kinds that scores are given for, `overall` last.

    Args:
        table: Predictions with the column `kind`.

    Returns:
        Every kind of sample in alphabetical order, with `benchmark/a` before `benchmark/a/b`.
    """
    found = {str(kind) for kind in table["kind"]}
    whole = {"/".join(kind.split("/")[:2]) for kind in found if kind.startswith(BENCHMARK)}
    return [*sorted(found | whole), OVERALL]


def rows_of(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the rows of a kind.

    Args:
        table: Predictions with the column `kind`.
        kind: One of `kinds_in`. `overall` is all rows but those of benchmarks, or, where there are no others, all.
    """
    kinds = table["kind"].astype(str)
    if kind == OVERALL:
        own = ~kinds.str.startswith(BENCHMARK)
        return table[own] if own.any() else table
    inside = kinds.str.startswith(f"{kind}/") if kind.startswith(BENCHMARK) else False
    return table[(kinds == kind) | inside]

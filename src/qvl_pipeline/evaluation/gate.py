"""Whether the trained model is worse than the base model: by more than is allowed, and by more than chance makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pandas as pd

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.metrics import LOSSES
from qvl_pipeline.evaluation.tasks import MEAN_OF_KINDS, NOT_A_MEAN
from qvl_pipeline.intervals import bootstrap_interval
from qvl_pipeline.kinds import OVERALL, rows_of

# 0.4 - 0.3 is a little more than 0.1; no two means of fewer than a million answers are so close without being equal.
_ROUNDING = 1e-9


def check_gate(kinds: Iterable[str], allowed: Mapping[str, float]) -> None:
    """Refuse a gate on kinds that are not evaluated.

    Args:
        kinds: Kinds of the evaluated samples.
        allowed: By sample kind (or `overall`), how much lower a score may be.

    Raises:
        UserError: A kind is not among the evaluated ones.
    """
    known = [*sorted(set(kinds) - {OVERALL}), OVERALL]
    if unknown := [kind for kind in allowed if kind not in known]:
        raise UserError(
            f"evaluate.must_not_regress names the sample kind '{unknown[0]}', which the eval split does not have: "
            f"use one of {', '.join(known)}"
        )


def regressions(
    metrics: Mapping[str, Any],
    predictions: pd.DataFrame,
    allowed: Mapping[str, float],
    certainty: Literal["difference", "significant"] = "difference",
) -> list[dict[str, Any]]:
    """List the scores in which the trained model is worse than the base model by more than is allowed.

    A score that is no number is worse: it passes no gate.

    Args:
        metrics: `base` and `trained`, as `average_scores` gives them.
        predictions: Table `predictions`, from which they are.
        allowed: By sample kind (or `overall`), how much lower a score may be.
        certainty: `difference` lists every larger drop; `significant` those that are so large in 95 % of the paired
            bootstrap's draws of the samples, and of a score that is no mean (BLEU) every one.

    Returns:
        Rows of `kind`, `metric`, `base`, `trained`, `allowed_drop`, and `low`, `high`: the 95 % interval of the
        difference, `None` of a score that is no mean.

    Raises:
        UserError: A kind is not among the evaluated ones.
    """
    check_gate(metrics["trained"], allowed)
    found = []
    for kind, drop in allowed.items():
        for name, trained in metrics["trained"][kind].items():
            base = metrics["base"][kind][name]
            if name in ("n", *LOSSES) or base - trained <= drop + _ROUNDING:
                continue
            low, high = _interval(predictions, kind, name)
            if certainty == "significant" and high is not None and high >= -drop - _ROUNDING:
                continue
            row = {"kind": kind, "metric": name, "base": base, "trained": trained, "allowed_drop": drop}
            found.append(row | {"low": low, "high": high})
    return found


def _interval(predictions: pd.DataFrame, kind: str, task: str) -> tuple[float | None, float | None]:
    """Return the 95 % interval of trained minus base, of samples drawn in pairs."""
    rows = rows_of(predictions, kind)
    rows = rows[rows["task"] == task]
    gains = (rows["trained_score"] - rows["base_score"]).astype(float)
    if task in (*NOT_A_MEAN, *MEAN_OF_KINDS) or gains.isna().any():
        return None, None
    return bootstrap_interval(gains.to_numpy())

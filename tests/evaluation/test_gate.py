from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.gate import regressions
from qvl_pipeline.evaluation.metrics import average_scores


def answered(base: list[float], trained: list[float], task: str = "exact_match") -> tuple[dict[str, Any], pd.DataFrame]:
    """Return metrics and predictions of video samples with these scores."""
    table = pd.DataFrame({"kind": "video", "task": task, "base_score": base, "trained_score": trained})
    table = table.assign(supervised_tokens=1, base_loss=1.0, trained_loss=9.0, expected="a b c d")
    table = table.assign(base_answer="a b c d", trained_answer="a b c e")
    return {model: average_scores(table, model) for model in ("base", "trained")}, table


def test_a_regression_is_a_score_below_that_of_the_base_model_by_more_than_is_allowed() -> None:
    metrics, table = answered([1, 1, 0, 0, 1], [1, 0, 0, 0, 1])
    assert regressions(metrics, table, {"overall": 0.25}) == []
    (row,) = regressions(metrics, table, {"overall": 0.3, "video": 0.1})
    interval = {"low": row.pop("low"), "high": row.pop("high")}
    assert row == {"kind": "video", "metric": "exact_match", "base": 0.6, "trained": 0.4, "allowed_drop": 0.1}
    assert (interval["low"], interval["high"]) == (-0.6, 0.0), "one of five samples may well be chance"
    with pytest.raises(UserError, match=r"names the sample kind 'vide'.*video, overall"):
        regressions(metrics, table, {"vide": 0.0})


def test_a_drop_that_is_allowed_to_the_last_digit_passes() -> None:
    # As floats, 0.4 - 0.3 is more than 0.1.
    metrics, table = answered([1] * 4 + [0] * 6, [1] * 3 + [0] * 7)
    assert metrics["base"]["video"]["exact_match"] - metrics["trained"]["video"]["exact_match"] > 0.1
    assert regressions(metrics, table, {"video": 0.1}) == []
    assert len(regressions(metrics, table, {"video": 0.0999})) == 1


def test_what_is_no_number_passes_no_gate() -> None:
    metrics, table = answered([0.0, 0.0], [0.0, math.nan])
    metrics["trained"]["video"]["exact_match"] = math.nan
    for certainty in ("difference", "significant"):
        assert [row["metric"] for row in regressions(metrics, table, {"video": 1.0}, certainty)] == ["exact_match"]


def test_a_drop_may_have_to_be_more_than_chance() -> None:
    few, many = answered([1, 1, 0, 0, 1], [1, 0, 0, 0, 1]), answered([1, 1, 0, 0, 1] * 100, [1, 0, 0, 0, 1] * 100)
    assert regressions(*few, {"video": 0.0}, "significant") == []
    (row,) = regressions(*many, {"video": 0.1}, "significant")
    assert -0.25 < row["low"] < -0.2 < row["high"] < -0.15
    assert regressions(*many, {"video": 0.18}, "significant") == [], "0.2 is beyond that, but maybe by chance"
    assert len(regressions(*many, {"video": 0.18})) == 1


def test_a_score_that_is_no_mean_has_no_interval_and_every_drop_counts() -> None:
    metrics, table = answered([1.0] * 9, [0.5] * 9, "bleu")
    (row,) = regressions(metrics, table, {"video": 0.0}, "significant")
    assert (row["low"], row["high"]) == (None, None)

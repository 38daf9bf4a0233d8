"""What the report shows of benchmarks, and of what lmms-eval measured."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from qvl_pipeline.evaluation.metrics import average_scores, right_answers
from qvl_pipeline.reports.evaluation.report import render_report
from tests.reports.evaluation.test_report import Page, prediction, report_facts

MEASURED = {
    model: {"lmms_eval/chartqa": {"relaxed_overall": score, "relaxed_overall_stderr": 0.0123, "n": 2500}}
    for model, score in (("trained", 0.8124), ("base", 0.4))
}


def facts_with_a_benchmark() -> dict[str, Any]:
    facts = report_facts()
    row = prediction(20, "benchmark/mmmu", True) | {"task": "mmmu"}
    row["expected"] = json.dumps({"answer": "B", "options": ["a cup of tea", "a plate"]})
    predictions = pd.concat([facts["predictions"], pd.DataFrame([row])], ignore_index=True)
    predictions = predictions.assign(supervised_tokens=1, base_loss=1.0, trained_loss=1.0)
    metrics = {model: average_scores(predictions, model) for model in ("trained", "base")}
    return facts | {"predictions": predictions, "metrics": metrics}


def test_a_benchmark_is_a_row_beside_the_kinds_and_the_headline_is_without_it() -> None:
    facts = facts_with_a_benchmark()
    text = " ".join(Page(render_report(**facts)).text.split())
    assert facts["metrics"]["trained"]["overall"]["n"] == 9
    assert "benchmark/ mmmu mmmu 1 " in text, "a line may end behind the slash"
    assert "5 of 9 exact matches" in text
    assert "and on benchmarks, which count in no mean" in text
    assert "on benchmarks" not in Page(render_report(**report_facts())).text


def test_the_expected_answer_of_a_benchmark_is_shown_alone() -> None:
    assert "a cup of tea" not in render_report(**facts_with_a_benchmark())
    assert right_answers('{"answer": ["6", "six"]}', "mmmu") == ["6", "six"]
    assert right_answers('{"answer": "6"}', "exact_match") == ['{"answer": "6"}'], "somebody's own answer in JSON"


def test_what_lmms_eval_measured_has_a_table_of_its_own() -> None:
    text = " ".join(Page(render_report(**report_facts(), measured=MEASURED)).text.split())
    assert "Scores by lmms-eval" in text
    assert "chartqa relaxed_overall 2,500 0.8124 ± 0.012 0.4 ± 0.012" in text
    assert "lmms-eval" not in Page(render_report(**report_facts(), measured={})).text

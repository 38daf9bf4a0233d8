"""Benchmarks are rows beside the own eval split: in scores of their own, in no mean, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvl_pipeline.evaluation.gate import check_gate, regressions
from qvl_pipeline.evaluation.metrics import average_scores, slices
from qvl_pipeline.evaluation.predictions import eval_samples
from qvl_pipeline.kinds import kinds_in
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from tests.evaluation.world import write_tokenized

CHARTS = "benchmark/chartqa"


def predicted(*rows: tuple[str, str, float]) -> pd.DataFrame:
    """Predictions of these kinds, tasks and scores of the trained model; the base model is always right."""
    table = pd.DataFrame(rows, columns=["kind", "task", "trained_score"])
    table = table.assign(source=[kind.split("/")[-1] for kind in table["kind"]], prompt_length=range(len(table)))
    answers = {"expected": "7", "base_answer": "7", "trained_answer": "7"}
    return table.assign(base_score=1.0, supervised_tokens=1, base_loss=1.0, trained_loss=1.0, **answers)


BOTH = predicted(
    ("text", "exact_match", 1.0),
    ("video", "exact_match", 0.0),
    (f"{CHARTS}/human_test", "relaxed_accuracy", 1.0),
    (f"{CHARTS}/human_test", "relaxed_accuracy", 1.0),
    (f"{CHARTS}/augmented_test", "relaxed_accuracy", 0.0),
    ("benchmark/chartqa_two/human_test", "relaxed_accuracy", 0.0),
)


def test_a_benchmark_has_a_score_and_its_groups_have_and_the_mean_is_the_own_split() -> None:
    scores = average_scores(BOTH, "trained")
    assert list(scores) == [
        *(CHARTS, f"{CHARTS}/augmented_test", f"{CHARTS}/human_test"),
        *("benchmark/chartqa_two", "benchmark/chartqa_two/human_test", "text", "video", "overall"),
    ]
    assert (scores[CHARTS]["relaxed_accuracy"], scores[CHARTS]["n"]) == (pytest.approx(2 / 3), 3)
    assert scores[f"{CHARTS}/human_test"]["relaxed_accuracy"] == 1.0
    assert scores["overall"] == {"exact_match": 0.5, "loss": 1.0, "perplexity": pytest.approx(2.718, abs=1e-3), "n": 2}
    lengths = slices(BOTH, "trained")["prompt_length"]
    assert sum(entry["n"] for entry in lengths.values()) == 2


def test_without_an_eval_split_the_mean_is_over_the_benchmarks() -> None:
    assert average_scores(BOTH.iloc[2:], "trained")["overall"]["n"] == 4


def test_mlvu_is_the_mean_over_its_types_of_questions() -> None:
    rows = [("plotQA", 1.0), ("plotQA", 1.0), ("plotQA", 0.0), ("order", 0.0)]
    table = predicted(*((f"benchmark/mlvu/{kind}", "mlvu", score) for kind, score in rows))
    scores = average_scores(table, "trained")
    assert scores["benchmark/mlvu"]["mlvu"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores["benchmark/mlvu/plotQA"]["mlvu"] == pytest.approx(2 / 3)


def test_a_gate_may_be_on_a_benchmark() -> None:
    metrics = {model: average_scores(BOTH, model) for model in ("base", "trained")}
    (row,) = regressions(metrics, BOTH, {CHARTS: 0.1, f"{CHARTS}/human_test": 0.0})
    assert (row["kind"], row["trained"], row["low"]) == (CHARTS, pytest.approx(2 / 3), -1.0)
    check_gate(kinds_in(BOTH), {CHARTS: 0.1})


def test_a_benchmark_is_evaluated_whole(tmp_path: Path) -> None:
    splits = ["train", "eval", "benchmark", "eval", "eval", "benchmark"]
    counts = {"length": 2, "supervised_tokens": 1, "vit_patches": 0, "spectra": 0, "prompt_length": 1}
    same: dict[str, Any] = {"kind": "text", "task": "ai2d", "label_spans": [], "media": [], "input_ids": [1, 2]}
    rows = [
        {"sample_id": f"{split}/{number}", "source": split, "split": split, "answer": "A"} | same | counts
        for number, split in enumerate(splits)
    ]
    write_tokenized(tmp_path / "tokenized.arrow", rows)
    chosen = eval_samples(TokenizedSamples(tmp_path / "tokenized.arrow"), 1)
    assert chosen["sample_id"].tolist() == ["eval/1", "benchmark/2", "benchmark/5"]
    assert chosen.index.tolist() == [1, 2, 5]
    assert "split" not in chosen

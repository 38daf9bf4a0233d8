from __future__ import annotations

import math
import sys

import pandas as pd
import pytest
import sacrebleu

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.metrics import (
    average_scores,
    check_scorable,
    references,
    score_answers,
    slices,
)


def samples(**columns: list[str]) -> pd.DataFrame:
    given = {"sample_id": ["a/0", "a/1"], "kind": ["text", "video"], "task": ["exact_match"] * 2, "expected": ["7"] * 2}
    return pd.DataFrame({**given, **columns})


def test_scorable_samples_pass() -> None:
    check_scorable(samples())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (samples(task=["exact_match", "exactmatch"]), "sample 'a/1' has the task 'exactmatch'.*exact_match"),
        (samples(kind=["text", "overall"]), "kind 'overall'"),
        (samples(task=["exact_match", "iou"]), "sample 'a/1': task 'iou' expects four numbers.*'7'"),
        (samples(task=["multiple_choice"] * 2, expected=['["A", "b)"]', "red"]), "sample 'a/1': .*an option's letter"),
        (samples().head(0), "eval split is empty.*eval_fraction"),
    ],
)
def test_samples_without_a_score_are_refused(bad: pd.DataFrame, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_scorable(bad)


def test_a_package_that_a_metric_needs_is_missed_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    check_scorable(samples(task=["cider"] * 2))
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match="'cider' needs pycocoevalcap"):
        check_scorable(samples(task=["cider"] * 2))


def predictions(**columns: list) -> pd.DataFrame:
    given = {
        "kind": ["video", "text", "text", "text"],
        "source": ["a", "a", "b", "b"],
        "task": ["exact_match"] * 4,
        "expected": ["7"] * 4,
        "prompt_length": [40, 10, 20, 30],
        "trained_answer": ["1", "7", "7", "1"],
        "trained_score": [0.0, 1.0, 1.0, 0.0],
        "supervised_tokens": [3, 1, 1, 1],
        "trained_loss": [2.0, 1.0, 4.0, 1.0],
    }
    return pd.DataFrame({**given, **columns})


def test_scores_are_averaged_by_kind_and_over_samples_and_losses_over_tokens() -> None:
    scores = average_scores(predictions(), "trained")
    assert scores["text"] == {"exact_match": pytest.approx(2 / 3), "loss": 2.0, "perplexity": math.exp(2.0), "n": 3}
    assert scores["video"] == {"exact_match": 0.0, "loss": 2.0, "perplexity": math.exp(2.0), "n": 1}
    assert scores["overall"]["exact_match"] == 0.5
    assert scores["overall"]["loss"] == (3 * 2 + 1 + 4 + 1) / 6
    assert list(scores) == ["text", "video", "overall"]


def test_scores_of_several_tasks_stand_side_by_side() -> None:
    scores = average_scores(predictions(task=["exact_match", "anls", "anls", "exact_match"]), "trained")
    assert {key: scores["text"][key] for key in ("anls", "exact_match")} == {"anls": 1.0, "exact_match": 0.0}


def test_bleu_of_many_answers_is_that_of_the_corpus_and_no_mean() -> None:
    texts = ["the cat is on the mat today", "a dog"]
    wanted = ["the cat is on the mat today", "a red dog ran"]
    table = predictions().head(2).assign(task="bleu", trained_answer=texts, expected=wanted, kind="text")
    assert average_scores(table, "trained")["text"]["bleu"] == sacrebleu.corpus_bleu(texts, [wanted]).score / 100


def test_slices_are_by_source_and_by_quarters_of_the_prompt_length() -> None:
    found = slices(predictions(), "trained")
    assert {name: entry["exact_match"] for name, entry in found["source"].items()} == {"a": 0.5, "b": 0.5}
    assert {name: entry["exact_match"] for name, entry in found["prompt_length"].items()} == {
        "10-10": 1.0,
        "20-20": 1.0,
        "30-30": 0.0,
        "40-40": 0.0,
    }


def test_prompts_of_one_length_are_one_slice() -> None:
    found = slices(predictions().assign(prompt_length=40), "trained")["prompt_length"]
    assert {name: entry["n"] for name, entry in found.items()} == {"40-40": 4}
    found = slices(predictions().assign(prompt_length=[9, 9, 9, 40]), "trained")["prompt_length"]
    assert {name: entry["n"] for name, entry in found.items()} == {"9-9": 3, "40-40": 1}


def test_acceptable_answers_are_a_json_list_or_one_text() -> None:
    assert references('["7", "seven"]') == ["7", "seven"]
    assert references("[1, 2, 3, 4]") == ["[1, 2, 3, 4]"]
    assert references('["7", 8]') == ['["7", 8]']
    assert references('["7"') == ['["7"']
    assert score_answers(["seven", "8"], ['["7", "seven"]', "7"], ["exact_match"] * 2) == [1.0, 0.0]

"""A thousand random answers a benchmark: scores are those that lmms-eval's own functions gave, to the last bit."""

from __future__ import annotations

import json

import pytest

from qvl_pipeline.evaluation.tasks import BENCHMARK_TASKS
from tests.evaluation.benchmarks.answers import PAIRS, pairs
from tests.evaluation.benchmarks.record import SCORES

PUBLISHED = json.loads(SCORES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", [task for task in BENCHMARK_TASKS if task != "mlvu"])
def test_scores_are_the_published_ones(task: str) -> None:
    given = pairs(task)
    differing = [
        (answer, wanted, published)
        for (answer, wanted), published in zip(given, PUBLISHED[task], strict=True)
        if BENCHMARK_TASKS[task](answer, wanted) != published
    ]
    assert differing == []
    assert PAIRS / 20 < sum(PUBLISHED[task]) < PAIRS * 19 / 20, "right answers and wrong ones"


def test_mlvu_is_scored_as_video_mme() -> None:
    assert BENCHMARK_TASKS["mlvu"] is BENCHMARK_TASKS["option_letter"]


def _mathvista(
    answer: str, wanted: str, kind: str, choices: list[str] | None = None, digits: int | None = None
) -> float:
    question = {"answer": wanted, "answer_type": kind, "choices": choices, "precision": digits}
    return BENCHMARK_TASKS["mathvista"](answer, json.dumps(question))


@pytest.mark.parametrize(
    ("answer", "wanted", "kind", "choices", "digits"),
    [
        ("The number missing in the sequence is 14.", "14", "integer", None, None),
        ("The fraction of females is 0.6, which means six out of ten.", "6", "integer", None, None),
        ("Luca needs $1.45 to buy both", "1.45", "float", None, 2),
        ("1,234 people", "1234", "integer", None, None),
        ("Its peak was between [2007, 2008].", "[2007, 2008]", "list", None, None),
        ("The correct answer is (B) 8/11.", "8/11", "text", ["3/11", "8/11", "6/11", "3/5"], None),
        ("B", "8/11", "text", ["3/11", "8/11", "6/11", "3/5"], None),
        ("Blue", "blue", "text", ["red", "blue"], None),
    ],
)
def test_answers_of_mathvista_are_found_by_rules(
    answer: str, wanted: str, kind: str, choices: list[str] | None, digits: int | None
) -> None:
    """The examples that the authors give to their model, and the like."""
    expected = 0.0 if "females" in answer else 1.0  # the last number is not always the answer
    assert _mathvista(answer, wanted, kind, choices, digits) == expected


def test_mmmu_draws_no_option_where_none_is_named() -> None:
    expected = json.dumps({"answer": "A", "options": ["yes", "no"]})
    assert [BENCHMARK_TASKS["mmmu"](answer, expected) for answer in ("A", "", "I do not know")] == [1.0, 0.0, 0.0]

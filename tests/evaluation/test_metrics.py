from __future__ import annotations

import pandas as pd
import pytest

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.metrics import average_scores, check_scorable, exact_match


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("7", "7", True),
        (" 7\n", "7", True),
        ("The  LEFT\tone", "the left one", True),
        ("STRASSE", "straße", True),
        ("7.", "7", False),
        ("seventeen", "seven", False),
        ("", "7", False),
        ("", " ", True),
    ],
)
def test_exact_match_ignores_case_and_white_space_only(answer: str, expected: str, right: bool) -> None:
    assert exact_match(answer, expected) is right


def samples(**columns: list[str]) -> pd.DataFrame:
    given = {"sample_id": ["a/0", "a/1"], "kind": ["text", "video"], "task": ["exact_match"] * 2}
    return pd.DataFrame({**given, **columns})


def test_scorable_samples_pass() -> None:
    check_scorable(samples())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (samples(task=["exact_match", "exactmatch"]), "sample 'a/1' has the task 'exactmatch'.*exact_match"),
        (samples(kind=["text", "overall"]), "kind 'overall'"),
        (samples().head(0), "eval split is empty.*eval_fraction"),
    ],
)
def test_samples_without_a_score_are_refused(bad: pd.DataFrame, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_scorable(bad)


def test_scores_are_averaged_by_kind_and_over_samples() -> None:
    kinds = pd.Series(["video", "text", "text", "text"])
    correct = pd.Series([False, True, True, False], dtype="boolean")
    scores = average_scores(kinds, pd.Series(["exact_match"] * 4), correct)
    assert scores == {
        "text": {"exact_match": pytest.approx(2 / 3), "n": 3},
        "video": {"exact_match": 0.0, "n": 1},
        "overall": {"exact_match": 0.5, "n": 4},
    }
    assert list(scores) == ["text", "video", "overall"]

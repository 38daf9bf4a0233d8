"""Samples whose rows name no task are scored by how long the answers of their source are, and that is said."""

from __future__ import annotations

import json

import pandas as pd

from qvl_pipeline.data.tables import AUTO
from qvl_pipeline.evaluation.default_task import LONG_WORDS, resolve_tasks
from qvl_pipeline.evaluation.tasks import rouge_l

LONG = " ".join(["word"] * (LONG_WORDS + 1))


def resolved(*rows: tuple[str, str, str]) -> list[tuple[str, str | None]]:
    table = pd.DataFrame(rows, columns=["source", "task", "expected"], index=range(7, 7 + len(rows)))
    found = resolve_tasks(table)
    assert found.index.equals(table.index)
    told = found["task_from"].astype(object).where(found["task_from"].notna(), None)
    return list(zip(found["task"], told, strict=True))


def test_a_source_has_one_task_by_its_answers() -> None:
    short, long = ("exact_match", "answers of 1 word"), ("rouge_l", "answers of 11 words")
    assert resolved(("a", AUTO, "7"), ("b", AUTO, LONG), ("a", AUTO, LONG), ("a", AUTO, "red"), ("b", AUTO, LONG)) == [
        *(short, long, short, short, long)
    ]


def test_ten_words_are_short() -> None:
    assert resolved(("a", AUTO, " ".join(["word"] * LONG_WORDS))) == [("exact_match", "answers of 10 words")]


def test_what_rows_name_is_left_and_does_not_count() -> None:
    assert resolved(("a", "anls", LONG), ("a", "anls", LONG), ("a", AUTO, "7")) == [
        *(("anls", None), ("anls", None), ("exact_match", "answers of 1 word"))
    ]


def test_of_several_answers_the_shortest_counts() -> None:
    assert resolved(("a", AUTO, json.dumps([LONG, "seven"]))) == [("exact_match", "answers of 1 word")]


def test_characters_count_where_words_are_not_parted() -> None:
    assert resolved(("a", AUTO, "这只猫坐在窗台上看外面的鸟")) == [("rouge_l", "answers of 13 words")]
    assert resolved(("a", AUTO, "七")) == [("exact_match", "answers of 1 word")]


def test_free_text_of_any_script_can_be_right() -> None:
    said = "这只猫坐在窗台上看外面的鸟"
    assert rouge_l(said, said) == 1.0
    assert 0.5 < rouge_l("猫坐在窗台上看鸟", said) < 1.0
    assert rouge_l("собака", said) == 0.0
    assert rouge_l("кошка сидит", "кошка спит") == 0.5

"""What stands at the head of a report means something of its data."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qvl_pipeline.intervals import score
from qvl_pipeline.reports.evaluation.headline import evaluation_notes, headline_tiles


def row(metric: str, trained: list[float], base: list[float] | None = None) -> dict[str, Any]:
    given = {"trained": trained, "base": base}
    cells = {
        name: score(sum(found) / len(found), pd.Series(found).to_numpy()) for name, found in given.items() if found
    }
    return {"kind": "all samples", "metric": metric, "total": True, "base": None, "gain": "+50.0", **cells}


def table(*tasks: tuple[str, str | None]) -> pd.DataFrame:
    rows = [
        {"sample_id": f"a/{n}", "source": "a", "task": task, "task_from": why} for n, (task, why) in enumerate(tasks)
    ]
    return pd.DataFrame(rows)


LOSSES = {
    "trained": {"overall": {"loss": 1.25, "perplexity": 3.49}},
    "base": {"overall": {"loss": 2.0, "perplexity": 7.389}},
}
FREE = ("rouge_l", "answers of 40 words")


def tiles_of(*given: Any) -> list[dict[str, str]]:
    tiles = headline_tiles(*given)
    return [{key: text.replace("\N{NO-BREAK SPACE}", " ") for key, text in tile.items()} for tile in tiles]


def test_the_score_of_most_samples_is_shown() -> None:
    kinds = [
        row("anls", [1.0, 0.0], [0.0, 0.0]),
        row("exact_match", [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]),
        row("rouge_l", [0.1]),
    ]
    tiles = tiles_of(kinds, LOSSES, table(*[("anls", None)] * 2, *[("exact_match", None)] * 4, ("rouge_l", None)))
    assert [(tile["role"], tile["value"]) for tile in tiles] == [
        ("trained", "75.0 %"),
        ("base", "25.0 %"),
        ("gain", "+50.0"),
    ]
    assert tiles[0]["detail"] == "3 of 4 exact matches"


def test_rouge_that_nobody_asked_for_gives_way() -> None:
    kinds = [row("exact_match", [1.0]), row("rouge_l", [0.2, 0.2, 0.2])]
    [tile, *_] = tiles_of(kinds, LOSSES, table(("exact_match", "answers of 1 word"), *[FREE] * 3))
    assert tile["detail"] == "1 of 1 exact matches"


def test_of_free_text_alone_it_is_the_perplexity() -> None:
    tiles = tiles_of([row("rouge_l", [0.25], [0.5])], LOSSES, table(FREE))
    assert [(tile["role"], tile["value"]) for tile in tiles] == [
        ("trained", "3.49"),
        ("base", "7.389"),
        ("gain", "-0.750"),
    ]
    assert tiles[0]["detail"] == "perplexity; loss 1.250, rouge_l 25.0 %"


def test_rouge_that_was_asked_for_or_is_all_there_is_is_shown() -> None:
    kinds = [row("rouge_l", [0.25], [0.5])]
    assert tiles_of(kinds, LOSSES, table(("rouge_l", None)))[0]["detail"] == "rouge_l, n = 1"
    of_a_server = {"trained": {"overall": {"n": 1}}}
    assert tiles_of(kinds, of_a_server, table(FREE))[0]["detail"] == "rouge_l, n = 1"


def test_tasks_that_were_chosen_and_failures_are_told() -> None:
    predictions = table(("anls", None), FREE, FREE)
    predictions["gpt_failure"] = [None, "status 500: no", None]
    assert evaluation_notes(predictions) == [
        "The rows of a name no task: rouge_l, by their answers of 40 words. The column task or evaluate.task_by_source "
        "say another.",
        "1 of 3 samples have no answer of the server of 'gpt', and are in no score of it: a/1 (status 500: no).",
    ]

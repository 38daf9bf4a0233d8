from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.predictions import eval_samples, prediction_table
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from tests.evaluation.world import write_tokenized

COLUMNS = ["sample_id", "source", "kind", "task", "question", "expected", "prompt_length"]
ANSWER_COLUMNS = ["base_answer", "trained_answer", "base_score", "trained_score", "supervised_tokens"]
ANSWER_COLUMNS += ["base_loss", "trained_loss"]


@pytest.fixture
def tokenized(tmp_path: Path) -> TokenizedSamples:
    """Twenty samples, every other one in the eval split."""
    empty = {"source": "made", "kind": "text", "task": "exact_match", "label_spans": [], "media": []}
    counts = {"length": 2, "supervised_tokens": 0, "vit_patches": 0, "spectra": 0, "prompt_length": 1}
    rows = [
        {"sample_id": f"made/{n}", "split": ("train", "eval")[n % 2], "answer": str(n), "input_ids": [1, 2]}
        | empty
        | counts
        for n in range(20)
    ]
    write_tokenized(tmp_path / "tokenized.arrow", rows)
    return TokenizedSamples(tmp_path / "tokenized.arrow")


def test_the_eval_split_alone_is_evaluated(tokenized: TokenizedSamples) -> None:
    chosen = eval_samples(tokenized, None)
    assert chosen.index.tolist() == list(range(1, 20, 2))
    assert chosen["expected"].tolist() == [str(row) for row in range(1, 20, 2)]


def test_plain_texts_ask_nothing(tmp_path: Path) -> None:
    row = {"source": "made", "split": "eval", "kind": "text", "task": "exact_match", "answer": "", "input_ids": [1, 2]}
    counts = {"label_spans": [], "media": [], "length": 2, "supervised_tokens": 1, "vit_patches": 0, "spectra": 0}
    rows = [row | counts | {"sample_id": f"made/{length}", "prompt_length": length} for length in (0, 1)]
    write_tokenized(tmp_path / "tokenized.arrow", rows)
    assert eval_samples(TokenizedSamples(tmp_path / "tokenized.arrow"), None)["sample_id"].tolist() == ["made/1"]


@pytest.mark.parametrize(
    ("most", "rows"),
    [(1, [1]), (2, [1, 19]), (4, [1, 7, 13, 19]), (10, list(range(1, 20, 2))), (99, list(range(1, 20, 2)))],
)
def test_fewer_samples_are_spread_over_the_split(tokenized: TokenizedSamples, most: int, rows: list[int]) -> None:
    assert eval_samples(tokenized, most).index.tolist() == rows


def test_every_answer_is_scored_against_its_own_sample(tokenized: TokenizedSamples) -> None:
    chosen = eval_samples(tokenized, 3)
    table = prediction_table(
        chosen,
        ["q1", "q2", "q3"],
        {"base": ["1", "1", "1"], "trained": ["1", " 9 ", "19"]},
        {"base": [3.0] * 3, "trained": [1.0, 2.0, 0.5]},
        [1, 2, 3],
    )
    assert list(table.columns) == COLUMNS + ANSWER_COLUMNS
    assert table["question"].tolist() == ["q1", "q2", "q3"]
    assert table["base_score"].tolist() == [1, 0, 0]
    assert table["trained_score"].tolist() == [1, 1, 1]
    assert table["trained_loss"].tolist() == [1.0, 2.0, 0.5]


def test_a_model_that_was_not_evaluated_is_null_and_typed(tokenized: TokenizedSamples, tmp_path: Path) -> None:
    table = prediction_table(
        eval_samples(tokenized, 2), ["q", "q"], {"trained": ["1", ""]}, {"trained": [0.5, 2.0]}, [1, 1]
    )
    table.to_parquet(tmp_path / "predictions.parquet")
    read = pd.read_parquet(tmp_path / "predictions.parquet")
    assert list(read.columns) == COLUMNS + ANSWER_COLUMNS
    assert read[["base_answer", "base_score", "base_loss"]].isna().all(axis=None)
    assert read["base_score"].dtype == "Float64"
    assert read["trained_score"].tolist() == [1, 0]


def test_a_source_can_be_given_another_task(tokenized: TokenizedSamples) -> None:
    assert set(eval_samples(tokenized, 3, {"made": "anls"})["task"]) == {"anls"}
    with pytest.raises(UserError, match=r"task_by_source names the source 'mode'.*made"):
        eval_samples(tokenized, 3, {"mode": "anls"})

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from qvl_pipeline.config import DatasetSource
from qvl_pipeline.errors import UserError
from qvl_pipeline.intervals import bootstrap_interval, wilson_interval
from qvl_pipeline.reports.compare.differing import ABSENT, grouped
from qvl_pipeline.reports.compare.page import render_comparison
from qvl_pipeline.reports.compare.tables import compare_runs
from tests.reports.evaluation.test_report import Page
from tests.trainings import Recorder, predictions

EASY, HARD = [True] * 9 + [False], [True] * 3 + [False] * 7


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Recorder:
    return Recorder(tmp_path_factory.mktemp("mlflow"), empty_database)


@pytest.fixture(autouse=True)
def _database(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has the database to itself."""
    for run in recorder.runs():
        recorder.client.delete_run(run)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(recorder.uri)
    yield
    mlflow.set_tracking_uri(before)


def test_a_name_means_the_newest_finished_training(recorder: Recorder) -> None:
    recorder.training("first")
    newest = recorder.training("first")
    recorder.training("first", status="FAILED")
    recorder.training("first", pipelines="ingest+validate")
    other = recorder.training("other", pipelines="train+evaluate")
    assert compare_runs(["first", "other"]).runs["run_id"].to_dict() == {"first": newest, "other": other}
    assert compare_runs().runs["run_id"].to_dict() == {"first": newest, "other": other}


def test_run_ids_and_dvc_experiments_name_trainings_too(recorder: Recorder) -> None:
    first = recorder.training("first", 1e-3, tags={"dvc_experiment": "slow"}, pipelines="train")
    second = recorder.training("first", 1e-2)
    third = recorder.training("first", 5e-3)
    runs = compare_runs(["slow", second, third]).runs
    assert runs["run_id"].tolist() == [first, second, third]
    assert list(runs.index) == ["slow", f"first {second[:8]}", f"first {third[:8]}"]
    assert compare_runs(["slow", second, third]).parameters.loc["train.learning_rate"].tolist() == [
        "0.001",
        "0.01",
        "0.005",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first", "bass"], "no finished training of a profile or DVC experiment 'bass'.*trainings of first, other"),
        (["first"], "1 trainings were found, and 2 to 8 can be compared"),
        (["first", "other", "first"], "'first' and 'first' are the same training"),
    ],
)
def test_what_cannot_be_compared_is_said(recorder: Recorder, names: list[str], message: str) -> None:
    recorder.training("first")
    recorder.training("other")
    with pytest.raises(UserError, match=message):
        compare_runs(names)


def test_a_run_that_is_no_training_is_refused(recorder: Recorder) -> None:
    recorder.training("first")
    with pytest.raises(UserError, match="is no training; it ran ingest"):
        compare_runs(["first", recorder.training("first", pipelines="ingest")])


def test_only_parameters_that_differ_are_listed(recorder: Recorder) -> None:
    recorder.training("first", 1e-3, parameters={"sample": {"fps": 2}, "model": {"image_max_pixels": 4096}})
    recorder.training(
        "other", 2e-3, parameters={"sample": {"fps": 1}, "model": {"image_max_pixels": 4096}, "new": {"a": None}}
    )
    table = compare_runs(["first", "other"]).parameters
    assert table.to_dict("index") == {
        "new.a": {"first": "not set", "other": "null"},
        "sample.fps": {"first": "2", "other": "1"},
        "train.learning_rate": {"first": "0.001", "other": "0.002"},
    }


def test_scores_have_intervals_and_gains_are_paired(recorder: Recorder) -> None:
    recorder.training("first", answers=predictions({"video": HARD, "text": EASY}))
    recorder.training("other", answers=predictions({"video": EASY, "text": EASY}))
    comparison = compare_runs(["first", "other"])
    scores = comparison.scores.set_index(["run", "kind"])
    assert scores.loc[("first", "video"), ["rate", "n", "low", "high"]].tolist() == [0.3, 10, *wilson_interval(0.3, 10)]
    assert scores.loc[("other", "overall"), "rate"] == 0.9
    gains = comparison.differences.set_index("kind")
    assert (gains["run"] == "other").all()
    paired = np.array([0.0] * 3 + [1.0] * 6 + [0.0])
    assert gains.loc["video", ["n", "difference", "low", "high"]].tolist() == [10, 0.6, *bootstrap_interval(paired)]
    # Unpaired, two shares of ten answers could differ by chance.
    assert gains.loc["text", ["difference", "low", "high"]].tolist() == [0.0, 0.0, 0.0]


def test_only_the_same_samples_are_paired(recorder: Recorder) -> None:
    answers = predictions({"video": HARD})
    recorder.training("first", answers=answers)
    changed = predictions({"video": EASY}).iloc[2:]
    changed.loc[3, "question"] = "Another question under the old number"
    recorder.training("other", answers=changed)
    comparison = compare_runs(["first", "other"])
    assert comparison.common == 7
    assert comparison.differences.set_index("kind").loc["video", "n"] == 7


def test_ten_different_answers_are_shown_of_all_kinds_those_that_matter_first(recorder: Recorder) -> None:
    recorder.training("first", answers=predictions({"video": [False] * 20, "text": [False] * 4, "same": EASY}))
    recorder.training(
        "other", answers=predictions({"video": [False] * 19 + [True], "text": [True] * 4, "same": EASY}, "8")
    )
    comparison = compare_runs(["first", "other"])
    assert comparison.disagreeing == 25  # the wrong answers are 7 and 8
    rows = comparison.disagreements
    assert len(rows) == 10
    kinds = rows.index.get_level_values("kind")
    assert set(kinds) == {"video", "text", "same"}
    assert rows.index.get_level_values("sample_id")[list(kinds).index("video")] == "digits/video/19"
    assert rows.xs("answer", axis=1, level=1).nunique(axis=1).eq(2).all()


def test_the_newest_evaluation_counts(recorder: Recorder) -> None:
    base = recorder.training(
        "first", answers=predictions({"video": HARD}), parameters={"evaluate": {"max_new_tokens": 4}}
    )
    recorder.training("other", answers=predictions({"video": HARD}), parameters={"evaluate": {"max_new_tokens": 4}})
    first = recorder.evaluation(base, predictions({"video": [True] * 10}), max_new_tokens=8)
    recorder.evaluation(base, predictions({"video": EASY}), max_new_tokens=16)
    newest, chosen = compare_runs(["first", "other"]), compare_runs([first, "other"])
    assert newest.scores["rate"].tolist()[0] == 0.9
    assert newest.parameters.loc["evaluate.max_new_tokens"].tolist() == ["16", "4"]
    assert chosen.scores["rate"].tolist()[0] == 1.0
    assert chosen.parameters.loc["evaluate.max_new_tokens"].tolist() == ["8", "4"]
    assert chosen.runs["run_id"].tolist()[0] == base


def test_without_predictions_there_are_scores_but_no_intervals(recorder: Recorder) -> None:
    run = recorder.training("first")
    for key, value in {"trained/video/exact_match": 0.4, "trained/video/n": 5, "trained/video/loss": 1.0}.items():
        recorder.client.log_metric(run, key, value)
    recorder.training("other", answers=predictions({"video": EASY}))
    comparison = compare_runs(["first", "other"])
    row = comparison.scores.iloc[0]
    assert row[["run", "kind", "metric", "rate", "n"]].tolist() == ["first", "video", "exact_match", 0.4, 5]
    assert np.isnan(row["low"])
    assert (comparison.common, len(comparison.differences), len(comparison.disagreements)) == (0, 0, 0)
    page = render_comparison(comparison)
    assert "The predictions of first are not in MLflow" in page
    assert "no sample to which MLflow has the answers of all of them" in page


def test_trainings_that_answered_other_samples_have_no_gain_and_the_page_says_why(recorder: Recorder) -> None:
    answers = predictions({"video": EASY})
    recorder.training("first", answers=answers)
    recorder.training("other", answers=answers.assign(question=answers["question"] + " Say it."))
    recorder.training("same", answers=answers)
    page = render_comparison(compare_runs(["first", "other", "same"]))
    assert "No gain of other over first:</b> the two evaluations have no sample in common" in page
    assert "No gain of same" not in page
    assert "samples are the same when their id, kind, task, question and expected answer are" in page


def test_a_parameter_of_one_source_differs_alone(recorder: Recorder) -> None:
    def declared(weight: float) -> dict[str, Any]:
        source = {"path": "data/a.json", "weight": weight, "storage_options": {"anon": True}}
        return {"ingest": {"datasets": [{"name": "a", **source}, {"name": "b", **source, "weight": 1.0}], "seed": 42}}

    recorder.training("first", parameters=declared(1.0))
    recorder.training("other", parameters=declared(0.5))
    parameters = compare_runs(["first", "other"]).parameters
    assert parameters.T.to_dict("list") == {"ingest.datasets.a.weight": ["1.0", "0.5"]}


def test_sources_are_one_row_each_and_defaults_are_folded(recorder: Recorder) -> None:
    def declared(*names: str, **changed: Any) -> dict[str, Any]:
        source = DatasetSource(name="x", path="data/a.json", data_type="json").model_dump(mode="json") | changed
        return {"ingest": {"datasets": [source | {"name": name} for name in names]}}

    names = [f"source.{number}" for number in range(22)]
    recorder.training("first", parameters={"new": {"key": 1}, **declared("common")})
    both = declared("common", *names, weight=0.5)
    recorder.training("other", parameters={**both, "evaluate": {"seed": 0, "max_new_tokens": 9}, "new": {"key": 2}})
    comparison = compare_runs(["first", "other"])
    assert len(comparison.parameters) > 22 * 9
    found = grouped(comparison.parameters)
    assert found.changed == [("evaluate.max_new_tokens", ["not set", "9"]), ("new.key", ["1", "2"])]
    assert found.defaults == [("evaluate.seed", ["not set", "0"])]
    assert found.sources[0] == ("common", ["weight 1.0", "weight 0.5"])
    assert found.sources[1] == ("source.0", [ABSENT, "path data/a.json, weight 0.5"])
    assert len(found.sources) == 23
    page = render_comparison(comparison)
    before_curves = page.split('id="curves"')[0]
    assert "<details><summary>23 sources differ</summary>" in before_curves
    assert "<details><summary>1 more has its default" in before_curves


def test_what_is_looked_for_first_is_first(recorder: Recorder) -> None:
    recorder.training("first", 1e-3, parameters={"batching": {"max_steps": 1}, "validate": {"min_fps": 1}})
    recorder.training("other", 2e-3, parameters={"batching": {"max_steps": 2}, "validate": {"min_fps": 2}})
    changed = [name for name, _ in grouped(compare_runs(["first", "other"]).parameters).changed]
    assert changed == ["train.learning_rate", "batching.max_steps", "validate.min_fps"]


def test_the_page_begins_with_the_scores_of_all_samples(recorder: Recorder) -> None:
    recorder.training("first", answers=predictions({"video": HARD}))
    recorder.training("other", answers=predictions({"video": EASY}))
    text = Page(render_comparison(compare_runs(["first", "other"]))).text
    assert "first exact_match 30.0 %" in text.split("What differs")[0]
    assert "other exact_match 90.0 % (+60.0)" in text.split("What differs")[0]


def test_speed_memory_and_versions_stand_side_by_side(recorder: Recorder) -> None:
    recorder.training("first", final_loss=0.2, tags={"mlflow.source.git.commit": "abc", "git_dirty": "true"})
    recorder.training("other", final_loss=0.3, tags={"mlflow.source.git.commit": "abc", "git_dirty": "false"})
    comparison = compare_runs(["first", "other"])
    figures = comparison.figures
    assert figures.loc["tokens per second"].tolist() == pytest.approx([200, 300]), "without the first, slow step"
    assert figures.loc["peak memory, GiB"].tolist() == [2.0, 2.0]
    assert figures.loc["MFU"].tolist() == pytest.approx([0.4, 0.4])
    assert figures.loc["training time, s"].tolist() == [61.5, 61.5]
    versions = comparison.versions
    assert versions.loc["code: git commit"].tolist() == ["abc", "abc"]
    assert versions.loc["code: uncommitted changes"].tolist() == ["true", "false"]
    assert versions.loc["data: pack_plan"].tolist() == ["sha:first", "sha:other"]
    assert "DVC experiment" not in versions.index


def test_curves_are_overlaid_and_text_is_escaped(recorder: Recorder, tmp_path: Path) -> None:
    recorder.training("first", answers=predictions({"video": HARD}))
    recorder.training("other", answers=predictions({"video": EASY}, answer="<script>alert(1)</script>"))
    comparison = compare_runs(["first", "other"])
    losses = comparison.curves.query("metric == 'train/loss' and run == 'first'").set_index("step")["value"]
    assert losses.index.tolist() == list(range(5, 201, 5))
    page = render_comparison(comparison)
    assert page == render_comparison(comparison)
    training_loss = page.split('aria-label="Training loss by optimizer step"')[1].split("</figure>")[0]
    assert all(f'class="line {run} smooth"' in training_loss for run in ("run0", "run1"))
    assert "Eval loss by optimizer step" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_metric_that_was_sent_twice_is_drawn_once(recorder: Recorder) -> None:
    run = recorder.training("first")
    recorder.training("other")
    recorder.client.log_metric(run, "train/loss", 9.0, step=5)
    losses = compare_runs(["first", "other"]).curves.query("metric == 'train/loss' and run == 'first'")
    assert losses["step"].is_unique
    assert pd.Series(losses["value"].to_numpy(), losses["step"])[5] == 9.0

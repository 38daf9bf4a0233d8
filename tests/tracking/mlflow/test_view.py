from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from qvl_pipeline.tracking.mlflow.view import MOST_PARAMETERS, packed, save_view, varying, view_state
from tests.trainings import EXPERIMENT, Recorder

RATES = [{"train.learning_rate": rate, "train.seed": "42", "ingest.datasets.a.weight": rate} for rate in ("1", "2")]


def test_columns_are_losses_scores_and_the_parameters_of_models_that_vary() -> None:
    scores = {"train/loss": 1.0, "eval/overall/anls": 0.5, "eval/overall/n": 9, "eval/video/anls": 0.4, "cpu": 1}
    state = view_state([(parameters, scores) for parameters in RATES])
    assert state["selectedColumns"] == [
        *("attributes.`Created`", "metrics.`train/loss`", "metrics.`eval/overall/anls`"),
        "params.`train.learning_rate`",
    ]
    assert [chart["metricKey"] for chart in state["compareRunCharts"]] == [
        *("train/loss", "eval/overall/anls", "eval/video/anls")
    ]
    sections = {section["uuid"]: section["name"] for section in state["compareRunSections"]}
    assert [sections[chart["metricSectionId"]] for chart in state["compareRunCharts"]] == [
        "Training",
        "Scores",
        "Scores",
    ]
    assert state == view_state([(parameters, scores) for parameters in RATES])


def test_no_more_parameters_than_there_is_room_for_those_of_the_training_first() -> None:
    runs = [{"batching.a": n, **{f"train.{key}": n for key in range(20)}, "model.b": n} for n in ("0", "1")]
    assert len(varying(runs)) == MOST_PARAMETERS
    assert {name.partition(".")[0] for name in varying(runs)} == {"train"}
    assert varying([{"batching.a": "1", "model.b": "1"}, {"batching.a": "2", "model.b": "2"}, {}]) == [
        *("model.b", "batching.a")
    ]
    assert varying([{"train.seed": "1"}, {}]) == []


def test_the_view_is_kept_with_the_experiment_and_nothing_is_made(tmp_path: Path, empty_database: Path) -> None:
    recorder = Recorder(tmp_path, empty_database)
    assert "viewStateShareKey" not in save_view(recorder.uri), "without a run there is nothing to show"
    recorder.training("first", 1e-3)
    recorder.training("other", 2e-3)
    path = save_view(recorder.uri)
    assert path.endswith("/runs?workflowType=machine_learning&viewStateShareKey=qvl_pipeline")
    (tag,) = recorder.client.get_experiment_by_name(EXPERIMENT).tags.items() - {
        ("mlflow.experimentKind", "custom_model_development")
    }
    assert tag[0] == "mlflow.sharedViewState.qvl_pipeline"
    assert "params.`train.learning_rate`" in unpacked(tag[1])["selectedColumns"]
    assert save_view(f"sqlite:///{tmp_path}/none.db") == "#/experiments/1/runs?workflowType=machine_learning"
    assert not (tmp_path / "none.db").exists()


def test_a_view_of_many_scores_is_not_too_long_for_a_database() -> None:
    """Databases of MLflow keep 5,000 characters of an experiment's tag."""
    metrics = [f"eval/kind number {number}/exact_match" for number in range(60)] + ["train/loss", "train/eval_loss"]
    state = view_state([(parameters, dict.fromkeys(metrics, 1.0)) for parameters in RATES])
    assert len(packed(state)) <= 5000
    assert unpacked(packed(state)) == state


def unpacked(text: str) -> dict[str, Any]:
    kind, _, data = text.partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(data)))

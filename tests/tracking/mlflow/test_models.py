"""Models in MLflow: ranked by their scores, registered after their evaluation, promoted when they are better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from kedro.framework.project import pipelines
from kedro.pipeline import Node, Pipeline

import tests.kedro_project as quick
from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.mlflow.outbox import Outbox
from tests.trainings import predictions

# Right answers of each further model, of 60 questions.
RIGHT = iter(())


def _evaluate(train_result: dict[str, Any], evaluate: EvaluateConfig) -> tuple[dict[str, Any], pd.DataFrame]:
    right = next(RIGHT)
    table = predictions({"video": [index < right for index in range(60)]})
    return {"trained": {"overall": {"exact_match": right / 60, "n": 60}}}, table


def _gate(metrics: dict[str, Any]) -> None:
    if metrics["trained"]["overall"]["exact_match"] < 0.1:
        raise UserError("worse than the base model")


def register_pipelines() -> dict[str, Pipeline]:
    registered = quick.register_pipelines()
    inputs, outputs = ["train_result", "params:evaluate"], ["metrics", "predictions"]
    registered["evaluate"] = Pipeline(
        [Node(_evaluate, inputs, outputs, name="answer"), Node(_gate, "metrics", None, name="gate")]
    )
    return registered


@pytest.fixture
def evaluated(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Evaluates a model that was trained at first, with so many right answers."""
    pipelines.configure(__name__)
    quick.run(project, "ingest", "tokenize")
    quick.run(project, "train")
    text = "register_model: {0}\nalias: candidate\npromote: {{alias: champion, on: video}}\n"
    (project / "conf/local/mlflow.yml").write_text(text.format(project.parent.name))

    def evaluate(right: int, **chosen: Any) -> None:
        monkeypatch.setattr(f"{__name__}.RIGHT", iter([right]))
        quick.run(project, "evaluate", params={"evaluate": chosen})

    return evaluate


def client_and_name(project: Path) -> tuple[mlflow.MlflowClient, str]:
    return mlflow.MlflowClient(), project.parent.name


def versions(project: Path) -> dict[int, str]:
    client, name = client_and_name(project)
    found = client.search_model_versions(f"name = '{name}'")
    return {int(each.version): each.tags.get("promotion", "") for each in found}


def test_a_better_model_is_promoted_and_a_worse_one_is_not(project: Path, evaluated: Callable[..., None]) -> None:
    client, name = client_and_name(project)

    def has(alias: str) -> int:
        return int(client.get_model_version_by_alias(name, alias).version)

    evaluated(30)
    assert (has("candidate"), has("champion")) == (1, 1)
    evaluated(20)
    assert (has("candidate"), has("champion")) == (2, 1)
    evaluated(31)
    assert (has("candidate"), has("champion")) == (3, 1), "one answer of sixty may be chance"
    evaluated(45)
    assert (has("candidate"), has("champion")) == (4, 4)
    outcomes = versions(project)
    assert outcomes[1] == "promoted to champion: there was none before"
    assert outcomes[2].startswith("not promoted to champion: -0.1667 [")
    assert outcomes[4].startswith("promoted to champion: +0.2500 [")
    assert outcomes[4].endswith("on 60 samples (video) against version 1")


def test_a_model_that_a_gate_refuses_is_not_registered(project: Path, evaluated: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="worse than"):
        evaluated(1)
    assert versions(project) == {}
    client, name = client_and_name(project)
    assert not [model for model in client.search_registered_models() if model.name == name]


def test_a_version_is_a_pointer_to_the_model_of_the_training(project: Path, evaluated: Callable[..., None]) -> None:
    evaluated(30)
    client, name = client_and_name(project)
    version = client.get_model_version_by_alias(name, "champion")
    result = json.loads((project / "data/08_reporting/tiny_qwen3_vl/train_result.json").read_text())
    assert version.run_id == result["mlflow_run_id"]
    assert version.tags["path"] == "data/06_models/tiny_qwen3_vl/trained"
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.name == "tiny_qwen3_vl"
    assert model.params["train.seed"] == "42"
    assert {metric.key: metric.value for metric in model.metrics}["eval/overall/exact_match"] == 0.5
    folder = Path(mlflow.artifacts.download_artifacts(version.source))
    files = {path.name for path in folder.iterdir()} - {"registered_model_meta"}  # of MLflow's own
    assert files == {"MLmodel", "pointer.json"}, "no weights"


def test_checkpoints_are_models_that_are_ranked_by_their_scores(project: Path, evaluated: Callable[..., None]) -> None:
    client, _ = client_and_name(project)
    kept = project / "data/06_models/tiny_qwen3_vl/checkpoints/step-3"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_text("weights of step 3")
    evaluated(30)
    evaluated(40, checkpoint="step-3")
    result = json.loads((project / "data/08_reporting/tiny_qwen3_vl/train_result.json").read_text())
    training = client.get_run(result["mlflow_run_id"])
    found = client.search_logged_models(
        [training.info.experiment_id],
        f"source_run_id = '{training.info.run_id}'",
        order_by=[{"field_name": "metrics.eval/overall/exact_match", "ascending": False}],
    )
    assert [model.name for model in found] == ["tiny_qwen3_vl-step-3", "tiny_qwen3_vl"]
    assert training.data.metrics["trained/overall/exact_match"] == 0.5, "scores of the trained model alone"


def test_the_untrained_model_is_one_of_them(project: Path) -> None:
    pipelines.configure(quick.__name__)
    for stages in (("ingest", "tokenize"), ("train",), ("evaluate",)):
        quick.run(project, *stages)
    client, _ = client_and_name(project)
    result = json.loads((project / "data/08_reporting/tiny_qwen3_vl/train_result.json").read_text())
    training = client.get_run(result["mlflow_run_id"]).info
    of_training = f"source_run_id = '{training.run_id}'"
    models = {model.name: model for model in client.search_logged_models([training.experiment_id], of_training)}
    assert models.keys() == {"tiny_qwen3_vl", "tiny_qwen3_vl-untrained"}
    untrained = models["tiny_qwen3_vl-untrained"]
    assert {metric.key: metric.value for metric in untrained.metrics} == {
        "eval/video/exact_match": 0.1,
        "eval/video/n": 3.0,
    }
    assert untrained.tags["path"] == "data/06_models/tiny_qwen3_vl/base"
    assert "model.processor_type" in untrained.params
    assert "train.seed" not in untrained.params, "it was not trained"
    quick.run(project, "evaluate")
    assert len(client.search_logged_models([training.experiment_id], of_training)) == 2, "the same one again"


def test_what_the_server_does_not_take_is_registered_later_once(
    project: Path, evaluated: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as down:
        refuse = mlflow.exceptions.MlflowException("busy")
        for name in ("log_model", "register"):
            kind = name.removeprefix("log_")
            down.setitem(_kinds(), kind, lambda *_, **__: (_ for _ in ()).throw(refuse))
        evaluated(30)
    assert versions(project) == {}
    for _ in range(2):
        Outbox().send_kept()
    assert list(versions(project)) == [1]
    client, name = client_and_name(project)
    assert int(client.get_model_version_by_alias(name, "champion").version) == 1


def _kinds() -> dict[str, Any]:
    from qvl_pipeline.tracking.mlflow import outbox

    return outbox._KINDS

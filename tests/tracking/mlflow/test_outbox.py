from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from kedro.framework.project import pipelines

import tests.kedro_project as quick
from qvl_pipeline.errors import UserError
from qvl_pipeline.storage.digests import read_sealed
from qvl_pipeline.tracking.mlflow import outbox
from qvl_pipeline.tracking.mlflow.outbox import Outbox
from tests.kedro_project import run
from tests.tracking.server import FaultyProxy

SCORE = "trained/video/exact_match"


@pytest.fixture
def proxy(server: int, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(outbox, "_PAUSE_S", 0.0)
    with FaultyProxy(server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
        mlflow.set_tracking_uri(proxy.uri)
        yield proxy


def stored(run_id: str, name: str) -> list[float]:
    return [point.value for point in mlflow.MlflowClient().get_metric_history(run_id, name)]


def runs() -> list[str]:
    """Return the ids of all runs, the oldest first."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("qvl_pipeline")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [found.info.run_id for found in found]


def synced(project: Path) -> dict[str, dict[str, int]]:
    pipelines.configure("qvl_pipeline.pipeline_registry")
    run(project, "sync_metrics")
    quick.use_quick_nodes(project)
    return read_sealed(project / "data/08_reporting/tiny_qwen3_vl/sync_report.json")


def test_an_evaluation_beside_a_server_that_is_down_is_sent_later_and_once(
    project: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(project, "ingest", "tokenize", "train")
    evaluate = quick._evaluate

    @functools.wraps(evaluate)
    def evaluate_while_it_fails(*inputs: Any, **more: Any) -> Any:
        proxy.failing = True
        return evaluate(*inputs, **more)

    monkeypatch.setattr(quick, "_evaluate", evaluate_while_it_fails)
    quick.use_quick_nodes(project)
    proxy.set_faults("dropped", "carried_out_and_dropped", "refused", "carried_out_and_refused")
    run(project, "evaluate")
    proxy.failing = False
    assert "MLflow does not take" in caplog.text
    training, evaluation = runs()[-2:]
    client = mlflow.MlflowClient()
    report = synced(project)
    assert set(report) == {training, evaluation}
    assert [counts["left"] for counts in report.values()] == [0, 0]
    for run_id in (training, evaluation):
        assert stored(run_id, SCORE) == [0.9], "once, though some requests had been carried out"
    assert {file.path for file in client.list_artifacts(evaluation)} >= {"metrics.json", "predictions.parquet"}
    ended = client.get_run(evaluation).info
    assert ended.status == "FINISHED"
    assert synced(project) == {}
    assert client.get_run(evaluation).info.end_time == ended.end_time
    assert not any((project / "data/unsent").iterdir())


def test_what_a_server_did_not_take_is_tried_again_when_the_run_ends(
    project: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qvl_pipeline.tracking.mlflow.run import MlflowRun

    run_id = mlflow.MlflowClient().create_run("0").info.run_id
    written = MlflowRun(run_id)
    proxy.set_faults("dropped")
    proxy.failing = True
    written.log_metrics({"a": 1.0})
    written.set_tags({"b": "text"})
    assert len(list((project / "data/unsent" / run_id).iterdir())) == 2
    proxy.failing = False
    written.finish("FINISHED")
    data = mlflow.MlflowClient().get_run(run_id).data
    assert (data.metrics["a"], data.tags["b"]) == (1.0, "text")
    assert not any((project / "data/unsent").iterdir())


def test_after_a_failure_a_server_is_left_alone_for_a_while(
    project: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_PAUSE_S", 60.0)
    run_id = mlflow.MlflowClient().create_run("0").info.run_id
    box = Outbox()
    proxy.set_faults("refused")
    proxy.failing = True
    for number in range(3):
        box.send(run_id, "a tag", {"kind": "tags", "texts": {f"tag {number}": "x"}})
    assert proxy.happened == ["refused"]
    proxy.failing = False
    assert box.send_kept({"another"}) == {}
    assert box.send_kept() == {run_id: {"sent": 3, "left": 0}}
    assert {f"tag {number}" for number in range(3)} <= mlflow.MlflowClient().get_run(run_id).data.tags.keys()


def test_what_no_server_will_ever_take_is_not_kept(project: Path, proxy: FaultyProxy) -> None:
    with pytest.raises(mlflow.exceptions.MlflowException):
        Outbox().send("0" * 32, "a tag", {"kind": "tags", "texts": {"a": "b"}})
    assert not (project / "data/unsent").exists()


def test_entries_of_a_run_that_the_server_does_not_have_stay(
    project: Path, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    entry = project / "data/unsent" / ("0" * 32) / "1-a" / "entry.json"
    entry.parent.mkdir(parents=True)
    entry.write_text(json.dumps({"kind": "tags", "texts": {"a": "b"}}))
    with pytest.raises(UserError, match="MLflow did not take all of 0000"):
        synced(project)
    assert "MLflow does not take what is in" in caplog.text
    assert entry.exists()

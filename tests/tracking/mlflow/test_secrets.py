"""Secrets are planted wherever a person has them; no file that a run writes may hold one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from kedro.framework.project import pipelines
from kedro.pipeline import Node, Pipeline

import tests.kedro_project as quick
from qvl_pipeline.config import BatchingConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.tracking.mlflow.run import going_on, log_json_file
from qvl_pipeline.tracking.mlflow.sinks import make_sinks
from qvl_pipeline.training.spec import Inputs, make_spec

SUMMARY = {
    "steps": 1,
    "fingerprint": "abc",
    "supervised_tokens": 1,
    "packs": 1,
    "tokens": 1,
    "samples": 1,
    "epochs": 1,
    "samples_per_epoch": 1,
}
# All of them end alike, so that one search finds any.
PLANTED = "Pl4nted-s3cret"


def _train(
    base_model: Path, plan_summary: dict[str, Any], model: ModelConfig, batching: BatchingConfig, train: TrainConfig
) -> tuple[Any, dict[str, Any]]:
    """Do all of the real node's reporting, and none of its training."""
    folder = base_model.parent / "scratch" / "abc"
    folder.mkdir(parents=True)
    (base_model / "manifest.json").write_text(json.dumps({"path": ".", "family": "qwen3_vl"}))
    spec = make_spec(
        Inputs(base_model, Path("tokenized.arrow"), Path("stream.parquet"), Path("frames"), SUMMARY),
        sample=SampleConfig(),
        model=model,
        batching=batching,
        weights={},
        train=train,
        output_dir=folder,
        identity={},
        resume_from="",
    )
    spec.save(folder / "train_spec.json")
    log_json_file(folder / "train_spec.json")
    sinks = make_sinks(train.report_to, folder / "metrics.jsonl", "tiny")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert [sink.close() for sink in sinks] == [0]
    with going_on("something"):
        raise OSError(f"no route to https://me:{PLANTED}@host/x?token={PLANTED}")
    return quick._write_model, {"mlflow_run_id": None}


def _page(raw_manifest: dict[str, Any]) -> str:
    """Show a row with a secret of its owner."""
    return f"<p>Authorization: Bearer page-{PLANTED}, https://host/a.png?sv=1&amp;sig=page-{PLANTED}</p>"


def register_pipelines() -> dict[str, Pipeline]:
    inputs = ["base_model", "plan_summary", "params:model", "params:batching", "params:train"]
    registered = quick.register_pipelines()
    registered["tokenize"] += Pipeline([Node(_page, "raw_manifest", "label_preview", name="page")])
    registered["train"] = Pipeline([Node(_train, inputs, ["trained_model", "train_result"], name="train")])
    return registered


@pytest.fixture
def planted(project: Path, server: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with secrets in its environment, its private files, its URLs and its command line."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, f"{name}-{PLANTED}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:uri-{PLANTED}@127.0.0.1:{server}")
    (project / "conf/local/credentials.yml").write_text(f"s3: {{key: me, secret: credentials-{PLANTED}}}\n")
    (project / ".dvc").mkdir()
    (project / ".dvc/config").write_text(f"['remote \"r\"']\n    url = https://me:dvc-{PLANTED}@host/cache\n")
    (project / "rows.jsonl").write_text("{}\n")
    # What a shell expands, and what somebody has copied from a browser.
    monkeypatch.setattr("sys.argv", ["kedro", "run", "--params", f"a.token=argument-{PLANTED},b=HF_TOKEN-{PLANTED}"])
    pipelines.configure(__name__)
    return project


@pytest.mark.parametrize("env", [None, "tiny_qwen2_5_vl"])
def test_no_file_of_a_run_and_no_line_of_its_log_holds_a_secret(
    env: str | None,
    planted: Path,
    tracking_database: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import mlflow

    sources = [
        {"name": "here", "path": "rows.jsonl", "data_type": "jsonl"},
        {"name": "there", "path": f"https://host/rows.jsonl?part=url-{PLANTED}", "data_type": "jsonl"},
    ]
    quick.run(planted, "ingest", "tokenize", "train", env=env, params={"ingest": {"demo": None, "datasets": sources}})
    caplog.set_level("DEBUG")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("qvl_pipeline")
    (run,) = client.search_runs([experiment.experiment_id], max_results=1)
    artifacts = Path(urlparse(run.info.artifact_uri).path.replace("%20", " "))
    database = Path(tracking_database.removeprefix("sqlite:///"))
    written = [path for root in (planted, artifacts) for path in root.rglob("*") if path.is_file()]
    written += database.parent.glob("mlflow.db*")
    names = {path.name for path in written}
    assert {"train_spec.json", "parameters.yml", "environment.txt", "metrics.jsonl", "mlflow.db"} <= names
    assert (artifacts / "train_spec.json").exists()
    assert "***" in (artifacts / "parameters.yml").read_text(), "the place is shown, the secret is not"
    found = [path for path in written if PLANTED.encode() in path.read_bytes()]
    assert "Authorization: Bearer" not in (artifacts / "label_preview.html").read_text()
    assert "***" in (artifacts / "label_preview.html").read_text(), (
        "the page of a data stage is masked where it goes out"
    )
    names = ["config", "credentials.yml", "label_preview.html"]
    assert sorted(path.name for path in found) == names, "only where they were planted"
    assert not any(path.is_relative_to(artifacts) for path in found)
    output = "".join(capfd.readouterr()) + caplog.text
    assert "MLflow does not have something: no route to https://***@host" in output
    assert PLANTED not in output

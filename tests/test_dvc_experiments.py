"""What DVC does with a trained project: moving data to another machine, experiments, and comparing them."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pandas as pd
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvl_pipeline.reports.compare.tables import compare_runs
from tests.dvc_repository import command

RESULT = "data/08_reporting/tiny_qwen3_vl/train_result.json"
METRICS = "data/08_reporting/tiny_qwen3_vl/metrics.json"
PARAMETERS = "conf/tiny_qwen3_vl/parameters.yml"
RATES = {"slow": 0.0005, "fast": 0.004}


def test_the_lock_has_what_a_run_by_kedro_made(trained: Path) -> None:
    assert command(trained, "dvc status") == "Data and pipelines are up to date.\n"


@pytest.fixture
def s3(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """DVC's configuration of a remote behind an S3 server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="team")
    yield f"[core]\nremote = team\n['remote \"team\"']\nurl = s3://team/qvl\nendpointurl = {url}\n"
    server.stop()


def test_a_clone_gets_data_from_an_s3_server_and_evaluates_without_training(
    trained: Path, tmp_path: Path, s3: str
) -> None:
    copy = tmp_path / "clone"
    command(trained.parent, f"git clone --quiet {trained} {copy}")
    for folder in (trained, copy):
        (folder / ".dvc/config.local").write_text(s3)
    command(trained, "dvc push")
    (trained / ".dvc/config.local").unlink()
    command(copy, "dvc pull")
    for layer in ("data/02_intermediate", "data/06_models/tiny_qwen3_vl/trained"):
        files = [path.relative_to(trained) for path in (trained / layer).rglob("*") if path.is_file()]
        assert files
        assert all((copy / file).read_bytes() == (trained / file).read_bytes() for file in files)
    committed = json.loads((copy / METRICS).read_text())
    shutil.rmtree(copy / "data" / "07_model_output")
    (copy / METRICS).unlink()
    command(copy, "kedro run --pipelines evaluate")
    assert json.loads((copy / METRICS).read_text()) == committed
    assert not (copy / "data" / "06_models" / "tiny_qwen3_vl" / "scratch").exists(), "nothing was trained"
    # The report tells which run it is of, so that alone may differ.
    assert "changed deps" not in command(copy, "dvc status")
    # Of two steps, the first; nothing of it is in the clone but what came from the server.
    command(copy, "kedro run --pipelines evaluate --params evaluate.checkpoint=step-1")
    early = json.loads((copy / METRICS).read_text())
    assert early["base"] == committed["base"]
    assert early["trained"] != committed["trained"]
    command(copy, "kedro run --pipelines evaluate --params evaluate.checkpoint=step-2")
    assert json.loads((copy / METRICS).read_text())["trained"] == committed["trained"], "the last step"


def test_a_clone_trains_on_from_a_checkpoint_that_it_pulled(trained: Path, tmp_path: Path) -> None:
    """In a profile of its own, and with a learning rate that hardly moves anything: so it ends where it began."""
    copy, kept = tmp_path / "clone", "data/06_models/tiny_qwen3_vl/checkpoints/step-1"
    command(trained.parent, f"git clone --quiet {trained} {copy}")
    for folder in (trained, copy):
        remote = f"[core]\nremote = disk\n['remote \"disk\"']\nurl = {tmp_path / 'remote'}\n"
        (folder / ".dvc/config.local").write_text(remote)
    command(trained, "dvc push")
    (trained / ".dvc/config.local").unlink()
    command(copy, "dvc pull")
    shutil.copytree(copy / "conf/tiny_qwen3_vl", copy / "conf/more")
    profile = (copy / "conf/more/globals.yml").read_text()
    (copy / "conf/more/globals.yml").write_text(profile.replace("tiny_qwen3_vl", "more"))
    changed = f"model.load_from_pretrained_path={kept},train.learning_rate=1e-12"
    command(copy, f"kedro run --env more --pipelines sample,tokenize,train,evaluate --params {changed}")

    def weights(folder: str) -> dict[str, torch.Tensor]:
        return load_file(copy / folder / "model.safetensors")

    start, end, untrained = (
        weights(kept),
        weights("data/06_models/more/trained"),
        weights("data/06_models/tiny_qwen3_vl/base"),
    )
    assert end.keys() == start.keys()
    assert all(torch.allclose(end[name], start[name], rtol=0, atol=1e-10) for name in start)
    assert not all(torch.equal(untrained[name].to(start[name].dtype), start[name]) for name in start)
    metrics = json.loads((copy / "data/08_reporting/more/metrics.json").read_text())
    # What it is compared with is the checkpoint.
    assert metrics["base"]["overall"]["loss"] == pytest.approx(metrics["trained"]["overall"]["loss"], rel=1e-6)


@pytest.fixture(scope="module")
def experiments(trained: Path) -> Path:
    """Two experiments with other learning rates: one in the project, one from the queue in a folder of its own."""
    change = f"-S {PARAMETERS}:train.learning_rate"
    command(trained, f"dvc exp run --queue --name fast {change}={RATES['fast']} train@tiny_qwen3_vl")
    command(trained, "dvc queue start")
    command(trained, f"dvc exp run --name slow {change}={RATES['slow']} train@tiny_qwen3_vl")
    deadline = time.monotonic() + 120
    while "Success" not in (status := command(trained, "dvc queue status")):
        assert "Failed" not in status, command(trained, "dvc queue logs fast")
        assert time.monotonic() < deadline, status
        time.sleep(2)
    return trained


@pytest.fixture(scope="module")
def table(experiments: Path) -> dict[str, dict[str, Any]]:
    """What `dvc exp show` has of every experiment: its parameters and metrics by file."""
    (head,) = (entry for entry in json.loads(command(experiments, "dvc exp show --json")) if entry["experiments"])
    return {experiment["name"]: experiment["revs"][0]["data"] for experiment in head["experiments"]}


def mlflow_run(experiment: str, database: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(database)
    found = client.get_experiment_by_name("qvl_pipeline")
    (run,) = client.search_runs(
        [found.experiment_id], f"tags.dvc_experiment = '{experiment}' and tags.pipelines = 'train'"
    )
    return run


def test_experiments_are_in_mlflow_and_agree_with_dvc(table: dict[str, dict[str, Any]], tracking_database: str) -> None:
    assert sorted(table) == ["fast", "slow"]
    losses = {}
    for name, rate in RATES.items():
        run = mlflow_run(name, tracking_database)
        parameters, result = table[name]["params"][PARAMETERS]["data"], table[name]["metrics"][RESULT]["data"]
        assert parameters["train"]["learning_rate"] == rate
        assert json.loads(run.data.params["train.learning_rate"]) == rate
        assert run.info.status == "FINISHED"
        assert run.data.tags["dvc_stage"] == "train@tiny_qwen3_vl"
        assert result["mlflow_run_id"] == run.info.run_id
        assert result["final_loss"] == run.data.metrics["train/loss"]
        losses[name] = result["final_loss"]
        assert run.info.run_name == f"tiny_qwen3_vl/train {name}"
        assert run.data.tags["git_dirty"] == "false", "only a parameter is another one"
        assert {"sample.fps", "validate.max_text_chars", "ingest.datasets.digits_jsonl.limit"} <= run.data.params.keys()
        above = mlflow.MlflowClient(tracking_database).get_run(run.data.tags["mlflow.parentRunId"])
        assert (above.info.run_name, above.info.status) == (f"tiny_qwen3_vl {name}", "FINISHED")
        assert {*run.data.params, "evaluate.batch_size"} <= above.data.params.keys()
    assert losses["slow"] != losses["fast"]


def test_metrics_are_compared(experiments: Path, table: dict[str, dict[str, Any]]) -> None:
    before, after = (table[name]["metrics"][RESULT]["data"]["final_loss"] for name in ("slow", "fast"))
    changed = json.loads(command(experiments, "dvc metrics diff slow fast --json"))[RESULT]["final_loss"]
    assert (changed["old"], changed["new"]) == (before, after)
    assert changed["diff"] == pytest.approx(after - before)


def test_loss_curves_are_drawn_together(experiments: Path, table: dict[str, dict[str, Any]]) -> None:
    command(experiments, "dvc plots diff slow fast --out curves")
    page = (experiments / "curves" / "index.html").read_text()
    assert "Training loss" in page
    for name in RATES:
        last = table[name]["metrics"][RESULT]["data"]["final_loss"]
        assert f'"rev": "{name}"' in page
        assert str(last) in page


def test_a_registered_model_is_loaded_from_the_remote_and_answers(
    trained: Path, tmp_path: Path, tracking_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    shutil.copytree(trained, project, symlinks=True)
    (project / "conf/local/mlflow.yml").write_text("register_model: loaded\npromote: {alias: champion, on: overall}\n")
    command(project, "kedro run --pipelines evaluate")
    # The model is in a remote, and nowhere else.
    shutil.move(project / ".dvc/cache", tmp_path / "storage")
    shutil.rmtree(project / "data/06_models")
    command(project, f"dvc remote add --default storage {tmp_path / 'storage'}")
    monkeypatch.chdir(project)
    mlflow.set_tracking_uri(tracking_database)
    model = mlflow.pyfunc.load_model("models:/loaded@champion")
    picture = next((project / "data/01_raw/digits").rglob("*.png"))
    encoded = base64.b64encode(picture.read_bytes()).decode()
    question = "Which digit is this?"
    rows = [{"question": question, "image": str(picture)}, {"question": question, "image": encoded}]
    answers = model.predict(pd.DataFrame([*rows, {"question": question, "image": None}]), params={"max_new_tokens": 4})
    served = trained / "data/06_models/tiny_qwen3_vl/trained"
    processor = AutoProcessor.from_pretrained(served)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    tokens = AutoModelForImageTextToText.from_pretrained(served, dtype=torch.float32).generate(
        **inputs, max_new_tokens=4, do_sample=False
    )
    expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[:2] == [expected, expected]
    assert len(answers) == 3


def test_the_comparison_agrees_with_dvc(table: dict[str, dict[str, Any]], tracking_database: str) -> None:
    mlflow.set_tracking_uri(tracking_database)
    found = compare_runs(["slow", "fast"])
    assert list(found.parameters.index) == ["train.learning_rate"]
    for name, rate in RATES.items():
        assert json.loads(found.parameters.loc["train.learning_rate", name]) == rate
        losses = found.curves.query("run == @name and metric == 'train/loss'").sort_values("step")
        assert losses["value"].iloc[-1] == table[name]["metrics"][RESULT]["data"]["final_loss"]

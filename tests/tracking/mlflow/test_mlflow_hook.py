from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvl_pipeline.config import BLOCKS, CompareConfig, ModelConfig, ReplayConfig, TrainConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.pipelines.compare.nodes import write_comparison
from qvl_pipeline.pipelines.replay.nodes import repeat
from qvl_pipeline.tracking.lineage.data_version import dvc_md5
from qvl_pipeline.tracking.lineage.digests import weights_digest
from tests.kedro_project import FAILS, METRICS, REPOSITORY, WAITS, make_project, run


def recorded() -> list[Any]:
    """Return all runs, the oldest first."""
    import mlflow

    # Not MLflow's own default: another test may have left it at another database.
    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI"))
    experiment = client.get_experiment_by_name("qvl_pipeline")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]) if experiment else []


def artifact(run_id: str, name: str) -> Path:
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def test_a_kedro_run_is_one_finished_run_named_after_the_profile(project: Path) -> None:
    before = len(recorded())
    run(project, env="tiny_qwen2_5_vl")
    (new,) = recorded()[before:]
    assert (new.info.run_name, new.info.status) == ("tiny_qwen2_5_vl", "FINISHED")
    assert {tag: new.data.tags[tag] for tag in ("profile", "dataset", "pipelines")} == {
        "profile": "tiny_qwen2_5_vl",
        "dataset": "digits",
        "pipelines": "__default__",
    }


def test_a_run_of_single_stages_has_their_names_too(project: Path) -> None:
    run(project, "tokenize", "ingest")
    assert recorded()[-1].info.run_name == "tiny_qwen3_vl/ingest+tokenize"


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_said_before_a_node_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    before = len(recorded())
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UserError, match=f"report_to names '{tracker}', which is not installed"):
        run(project, params={"train": {"report_to": ["mlflow", tracker]}})
    assert len(recorded()) == before
    assert not (project / "data/01_raw").exists()


def test_the_experiment_is_one_of_trainings(project: Path) -> None:
    """MLflow then opens it on its table of runs."""
    import mlflow

    run(project, "ingest")
    experiment = mlflow.MlflowClient().get_experiment(recorded()[-1].info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_parameters_are_flat_with_defaults_and_only_of_the_blocks_in_use(project: Path) -> None:
    run(project, params={"train": {"learning_rate": 0.5}, "evaluate": {"max_samples": 7}})
    params = recorded()[-1].data.params
    expected = {
        f"{block}.{key}"
        for block, model in (("train", TrainConfig), ("model", ModelConfig))
        for key in model.model_fields
    }
    expected = expected - {"train.fsdp_config", "train.launch"} | {
        "train.launch.max_restarts",
        "train.fsdp_config.reshard_after_forward",
        "train.fsdp_config.transformer_layer_cls_to_wrap",
    }
    assert expected <= params.keys()
    assert {key.split(".")[0] for key in params} == {"ingest", "train", "model", "evaluate"}
    assert params["train.learning_rate"] == "0.5"
    assert params["train.report_to"] == '["mlflow"]'
    assert params["ingest.datasets.digits_jsonl.data_type"] == "jsonl", "one parameter a source and key"
    assert "ingest.datasets" not in params
    assert params["evaluate.max_samples"] == "7"


def test_the_merged_parameters_of_all_blocks_are_an_artifact(project: Path) -> None:
    run(project, "ingest", params={"train": {"learning_rate": 0.5}})
    parameters = yaml.safe_load(artifact(recorded()[-1].info.run_id, "parameters.yml").read_text())
    assert parameters["train"]["learning_rate"] == 0.5
    # With all defaults: two runs of different stages differ in what was given, and not in what was read.
    assert {name: set(block) for name, block in parameters.items()} == {
        name: set(model.model_fields) for name, model in BLOCKS.items()
    }


@pytest.mark.parametrize("env", [None, "tiny_qwen2_5_vl"])
def test_where_every_parameter_comes_from_is_an_artifact(project: Path, env: str | None) -> None:
    (project / "conf/local/parameters.yml").write_text(
        "train: {seed: 7}\nevaluate: {task_by_source: {digits_jsonl: anls}}\n"
    )
    run(project, "ingest", "tokenize", "train", env=env, params={"train": {"learning_rate": 0.5}})
    last = recorded()[-1]
    origin = yaml.safe_load(artifact(last.info.run_id, "parameters_origin.yml").read_text())
    profile = f"conf/{env or 'tiny_qwen3_vl'}/parameters.yml"
    expected = {
        "train.learning_rate": "--params",
        "train.seed": "conf/local/parameters.yml",
        "evaluate.task_by_source.digits_jsonl": "conf/local/parameters.yml",
        "train.save_steps": profile,
        "ingest.demo.seed": profile,
        "evaluate.report_title": "conf/base/parameters.yml",
        "train.optim": "default",
    }
    assert {key: origin[key] for key in expected} == expected
    assert last.data.params["train.seed"] == "7", "what is one's own is recorded like all others"
    of_sources = "ingest.datasets."  # where the list of them is from, not each
    assert {key for key in last.data.params if not key.startswith(of_sources)} <= origin.keys()


def test_a_value_too_long_for_mlflow_is_cut_and_named(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = ["model.visual.*"] * 500
    run(project, params={"train": {"freeze_modules": modules}})
    data, run_id = recorded()[-1].data, recorded()[-1].info.run_id
    assert len(data.params["train.freeze_modules"]) == 6000
    assert data.tags["parameters_cut"] == "train.freeze_modules"
    assert "only the start of train.freeze_modules" in caplog.text
    assert yaml.safe_load(artifact(run_id, "parameters.yml").read_text())["train"]["freeze_modules"] == modules


def test_metrics_artifacts_tags_and_data_of_saved_entries_are_recorded(project: Path) -> None:
    run(project)
    new = recorded()[-1]
    assert new.data.metrics == {
        "untrained/video/exact_match": 0.1,
        "untrained/video/n": 3,
        "trained/video/exact_match": 0.9,
        "trained/video/n": 3,
        "trained/kind_-1f15a3/exact_match": 1,
        "trained/-e3b0c4/exact_match": 0,
        # Of the evaluated model, by which models are ranked.
        "eval/video/exact_match": 0.9,
        "eval/video/n": 3,
        "eval/kind_-1f15a3/exact_match": 1,
        "eval/-e3b0c4/exact_match": 0,
    }
    written = json.loads(artifact(new.info.run_id, "metrics.json").read_text())
    assert written.pop("digest")
    assert written == METRICS
    for name in ("predictions.parquet", "plan_summary.json", "train_result.json"):
        assert artifact(new.info.run_id, name).stat().st_size > 0
    assert (new.data.tags["data_fingerprint"], new.data.tags["plan_fingerprint"]) == ("data-1", "plan of data-1")
    assert [used.dataset.name for used in new.inputs.dataset_inputs] == ["raw_manifest"]


def test_a_stage_alone_records_its_inputs_and_the_fingerprints_of_what_is_there(project: Path) -> None:
    run(project, "ingest", "tokenize")
    run(project, "train")
    new = recorded()[-1]
    used = {entry.dataset.name: entry.dataset for entry in new.inputs.dataset_inputs}
    assert set(used) == {"base_model", "plan_summary"}
    assert (
        used["base_model"].digest
        == f"md5:{dvc_md5(project / 'data/06_models/tiny_qwen3_vl/base').removesuffix('.dir')}"
    )
    # MLflow has one entry of a name and a digest: another test's project, which it saw first, may have made the same.
    assert json.loads(used["base_model"].source)["uri"].endswith("/a project/data/06_models/tiny_qwen3_vl/base")
    assert (new.data.tags["data_fingerprint"], new.data.tags["plan_fingerprint"]) == ("data-1", "plan of data-1")
    assert new.data.tags["pipelines"] == "train"
    run(project, "ingest")
    assert "plan_fingerprint" not in recorded()[-1].data.tags, "that of another run's plan"


def test_of_several_nodes_only_the_first_has_a_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(project, "ingest", "tokenize")
    before = len(recorded())
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    run(project, "train")
    assert len(recorded()) == before


def test_pipelines_are_named_in_the_order_of_the_stages(project: Path) -> None:
    run(project, "tokenize", "ingest")
    assert recorded()[-1].data.tags["pipelines"] == "ingest+tokenize"


def test_an_evaluation_writes_its_metrics_into_the_run_of_the_training_too(project: Path) -> None:
    run(project, "ingest", "tokenize", "train")
    training = recorded()[-1]
    run(project, "evaluate")
    evaluation = recorded()[-1]
    assert evaluation.info.run_id != training.info.run_id
    assert evaluation.data.tags["mlflow.parentRunId"] == training.info.run_id
    import mlflow

    training = mlflow.MlflowClient().get_run(training.info.run_id)
    assert training.data.metrics["trained/video/exact_match"] == 0.9
    assert training.info.status == "FINISHED"


def test_a_training_that_was_recorded_elsewhere_is_no_fault(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(project, "ingest", "tokenize", "train")
    result = project / "data/08_reporting/tiny_qwen3_vl/train_result.json"
    result.write_text(json.dumps({"mlflow_run_id": "0" * 32}))
    run(project, "evaluate")
    assert f"run {'0' * 32}, which trained this model, is in another MLflow" in caplog.text
    ours = [record for record in caplog.records if record.name.startswith("qvl_pipeline")]
    assert [record.message for record in ours if record.levelname == "WARNING"] == []
    assert recorded()[-1].info.status == "FINISHED"
    assert recorded()[-1].data.metrics["trained/video/exact_match"] == 0.9


def test_a_failed_run_is_failed_and_the_next_one_is_its_own(project: Path) -> None:
    run(project, "ingest", "tokenize")
    with pytest.raises(ZeroDivisionError):
        run(project, "train", params={"train": {"seed": FAILS}})
    failed = recorded()[-1]
    assert failed.info.status == "FAILED"
    run(project, "train")
    assert recorded()[-1].info.run_id != failed.info.run_id
    assert recorded()[-1].info.status == "FINISHED"


def test_a_run_that_cannot_start_is_not_recorded(project: Path) -> None:
    before = len(recorded())
    with pytest.raises(UserError, match="base_model"):
        run(project, "train")
    with pytest.raises(UserError, match="learning_rat"):
        run(project, params={"train": {"learning_rat": 1}})
    assert len(recorded()) == before


def test_an_inherited_run_is_not_continued(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(project, "ingest")
    before = recorded()
    monkeypatch.setenv("MLFLOW_RUN_ID", before[-1].info.run_id)
    run(project, "ingest")
    assert len(recorded()) == len(before) + 1
    assert recorded()[-2].info.end_time == before[-1].info.end_time
    assert recorded()[-1].info.status == "FINISHED"


def test_two_first_runs_at_once_share_the_experiment(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    run(project, "ingest")
    find = MlflowClient.get_experiment_by_name
    looked_up: list[str] = []

    def look_up(self: MlflowClient, name: str) -> Any:
        looked_up.append(name)
        return None if len(looked_up) == 1 else find(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look_up)
    run(project, "ingest")
    assert recorded()[-1].info.status == "FINISHED"


def test_a_user_without_a_name_can_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    run(project, "ingest")
    assert recorded()[-1].data.tags["mlflow.user"] == "unknown"


def test_dvc_and_git_are_tags(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "ingest@digits")
    monkeypatch.setenv("DVC_EXP_NAME", "wider")
    run(project, "ingest")
    tags = recorded()[-1].data.tags
    assert (tags["dvc_stage"], tags["dvc_experiment"]) == ("ingest@digits", "wider")
    assert "mlflow.source.git.commit" not in tags, "the project is in no git repository"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "conf", "pyproject.toml"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "all"], check=True)
    run(project, "ingest")
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    tags = recorded()[-1].data.tags
    assert (tags["mlflow.source.git.commit"], tags["git_dirty"]) == (commit, "false")


def test_the_environment_is_an_artifact(project: Path) -> None:
    run(project, "ingest")
    lines = artifact(recorded()[-1].info.run_id, "environment.txt").read_text().splitlines()
    assert f"# python: {sys.version.split()[0]}" in lines
    assert f"# cuda: {torch.version.cuda or 'none, torch is built for CPUs'}" in lines
    assert f"torch=={version('torch')}" in lines
    assert f"mlflow=={version('mlflow')}" in lines


def test_a_trained_model_is_a_pointer(project: Path) -> None:
    run(project)
    folder = project / "data/06_models/tiny_qwen3_vl/trained"
    assert json.loads(artifact(recorded()[-1].info.run_id, "model/pointer.json").read_text()) == {
        "path": "data/06_models/tiny_qwen3_vl/trained",
        "digest": f"md5:{dvc_md5(folder).removesuffix('.dir')}",
        "version": "content, not recorded by DVC",
        "weights": weights_digest(folder),
    }


def test_declared_sources_are_inputs_with_their_version(project: Path) -> None:
    rows = project / "rows.jsonl"
    rows.write_text("{}\n")
    datasets = [{"name": "here", "path": "rows.jsonl", "data_type": "jsonl"}]
    run(project, "ingest", params={"ingest": {"demo": None, "datasets": datasets}})
    from qvl_pipeline.tracking.mlflow.run import MlflowRun

    MlflowRun(recorded()[-1].info.run_id).log_source("there", "s3://me:secret@bucket/rows.jsonl", {"copy": "0" * 64})
    used = {entry.dataset.name: entry for entry in recorded()[-1].inputs.dataset_inputs}
    assert used.keys() == {"raw_manifest", "here", "there"}
    assert used["here"].dataset.digest == f"md5:{hashlib.md5(rows.read_bytes()).hexdigest()}"
    assert {tag.key: tag.value for tag in used["here"].tags} == {
        "mlflow.data.context": "raw data",
        "version": "content, not recorded by DVC",
    }
    assert used["there"].dataset.digest.startswith("sha:")
    assert json.loads(used["there"].dataset.source) == {"uri": "s3://***@bucket/rows.jsonl"}


def test_the_machine_is_watched_in_stages_that_take_long(project: Path) -> None:
    (project / "conf/local/mlflow.yml").write_text("system_metrics_interval_s: 0.05\n")
    run(project, "ingest", "tokenize")
    assert not [name for name in recorded()[-1].data.metrics if name.startswith("system/")]
    run(project, "train", params={"train": {"seed": WAITS}})
    assert recorded()[-1].data.metrics["system/cpu_utilization_percentage"] >= 0
    assert not [thread for thread in threading.enumerate() if thread.name == "system metrics"]
    (project / "conf/local/mlflow.yml").write_text("system_metrics_interval_s: 0\n")
    run(project, "train", params={"train": {"seed": WAITS}})
    assert not [name for name in recorded()[-1].data.metrics if name.startswith("system/")]


def test_an_unknown_key_of_mlflow_yml_is_refused(project: Path) -> None:
    (project / "conf/local/mlflow.yml").write_text("experimnt: x\n")
    with pytest.raises(UserError, match=r"mlflow.yml: .*did you mean 'experiment'"):
        run(project, "ingest")


DEAD = (
    "MLflow at http://***@127.0.0.1:9 {}: it does not answer (Connection refused). Start the server, or let "
    "MLFLOW_TRACKING_URI, or tracking_uri in mlflow.yml, name another"
)


def test_a_tracking_server_that_cannot_be_used_is_said_before_a_node_runs_and_without_its_password(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError) as caught:
        run(project, "ingest")
    assert str(caught.value) == DEAD.format("cannot record this run")
    assert not (project / "data").exists()


@pytest.mark.parametrize(
    "ask",
    [lambda: write_comparison(CompareConfig()), lambda: repeat(ReplayConfig(run_id="a"))],
    ids=["compare", "replay"],
)
def test_a_server_that_is_only_asked_and_is_down_is_one_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object]
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://me:secret@127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        ask()
    assert str(caught.value) == DEAD.format("cannot be asked")


@pytest.mark.parametrize(
    ("pipeline", "place", "reason"),
    [
        ("ingest", "", "it is a folder"),
        ("ingest", "README.md", "file is not a database"),
        ("compare", "README.md/mlflow.db", "File exists|Not a directory"),
    ],
)
def test_a_database_that_cannot_be_opened_is_said_at_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, pipeline: str, place: str, reason: str
) -> None:
    (project / "README.md").write_text("Digits\n" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / place}")
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    with pytest.raises(UserError, match=rf"MLflow cannot record runs in sqlite:///.*: .*({reason})") as caught:
        run(project, pipeline)
    assert "MLFLOW_TRACKING_URI, or tracking_uri in mlflow.yml, name a database file" in str(caught.value)


def test_a_large_file_stays_out_of_mlflow(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("qvl_pipeline.tracking.mlflow.run.MAX_ARTIFACT_BYTES", 10)
    run(project, "ingest", "tokenize")
    assert "plan_summary.json (0 MiB) is not copied into MLflow" in caplog.text


INTERRUPTED = """
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from kedro.framework.project import pipelines
from kedro.framework.startup import bootstrap_project
from kedro.pipeline import Node, Pipeline
import tests.kedro_project as quick
from qvl_pipeline.cli import run

def wait():
    import time
    print("waiting", flush=True)
    for _ in range(6000):
        time.sleep(0.01)

def wait_in_daft():
    import atexit
    import daft
    atexit.register(print, "cleaned up")

    @daft.func.batch(return_dtype=daft.DataType.int64())
    def work(numbers: daft.Series):
        wait()

    daft.from_pydict({"n": [1]}).select(work(daft.col("n"))).collect()

bootstrap_project(Path.cwd())
waiting = Pipeline([Node(globals()[sys.argv[1]], None, "raw_manifest", name="wait")])
quick.register_pipelines = lambda: {"ingest": waiting, "__default__": waiting}
pipelines.configure("tests.kedro_project")
run(["--pipelines", "ingest"])
"""


@pytest.mark.parametrize("work", ["wait", "wait_in_daft"])
@pytest.mark.parametrize(("name", "returncode"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_an_interrupted_run_is_killed(project: Path, name: str, returncode: int, work: str) -> None:
    import signal

    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, work],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(getattr(signal, name))
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == returncode
    assert printed.endswith("cleaned up\n") == (work == "wait_in_daft")
    assert ("Aborted!" in errors) == (name == "SIGINT")
    assert "Traceback" not in errors
    assert recorded()[-1].info.status == "KILLED"


def test_without_a_server_the_database_is_in_the_project(tmp_path: Path, empty_database: Path) -> None:
    from mlflow import MlflowClient

    folder = make_project(tmp_path / "with spaces")
    (folder / "notebooks").mkdir()
    shutil.copy(empty_database, folder)
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    script = (
        "from pathlib import Path; import tests.kedro_project as quick; folder = Path.cwd().parent;"
        "quick.use_quick_nodes(folder); quick.run(folder)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder / "notebooks", env=environment, check=True)
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    assert len(client.search_runs([client.get_experiment_by_name("qvl_pipeline").experiment_id])) == 1
    assert len(list((folder / "mlartifacts").rglob("metrics.json"))) == 1
    assert list((folder / "notebooks").iterdir()) == []

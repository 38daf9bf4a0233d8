from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline

from qvl_pipeline.config import EvaluateConfig, TrainConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.hooks import EarlyChecks
from qvl_pipeline.locks import lock
from tests.evaluation.world import write_tokenized
from tests.kedro_project import SHIPPED, register_pipelines, run


def refusal(project: Path, *names: str, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        run(project, *names, **options)
    return str(caught.value).splitlines()


def test_missing_inputs_are_named_with_their_place_and_the_command_that_makes_them(project: Path) -> None:
    assert refusal(project, "train") == [
        "train cannot start, inputs do not exist yet:",
        "  base_model (data/06_models/tiny_qwen3_vl/base)",
        "  plan_summary (data/08_reporting/tiny_qwen3_vl/plan_summary.json)",
        "Run `kedro run --pipelines ingest,tokenize` first.",
    ]


def test_only_what_is_missing_is_to_be_run_and_with_the_same_profile(project: Path) -> None:
    run(project, "ingest", env="tiny_qwen2_5_vl")
    assert refusal(project, "train", env="tiny_qwen2_5_vl")[-1] == (
        "Run `kedro run --pipelines tokenize --env tiny_qwen2_5_vl` first."
    )


def test_a_chain_that_makes_its_own_inputs_runs(project: Path) -> None:
    run(project, "ingest", "tokenize", "train")
    assert (project / "data/08_reporting/tiny_qwen3_vl/train_result.json").exists()


def test_an_input_that_no_pipeline_makes_is_yours_to_provide(project: Path) -> None:
    from kedro.pipeline import Node, Pipeline

    checks = EarlyChecks()
    checks.after_catalog_created({"own_data": {"filepath": "/elsewhere/own.parquet"}})
    pipeline = Pipeline([Node(lambda data: data, "own_data", "copy")])
    catalog = DataCatalog({"own_data": MemoryDataset()})
    with pytest.raises(UserError, match=r"own_data \(/elsewhere/own.parquet\)\nNo pipeline makes own_data"):
        checks.before_pipeline_run(
            {"project_path": str(project), "env": None, "pipeline_names": None}, pipeline, catalog
        )


def test_an_unknown_profile_names_the_nearest_and_all_of_them(project: Path) -> None:
    (line,) = refusal(project, env="tiny_qwen2_5_v")
    assert line.startswith("there is no profile 'tiny_qwen2_5_v': did you mean 'tiny_qwen2_5_vl'? The profiles")
    assert ", ".join(sorted(SHIPPED)) in line
    assert line.endswith("`kedro profile new tiny_qwen2_5_v --data FILE` makes it")


@pytest.mark.parametrize("env", ["base", "local"])
def test_what_all_profiles_share_and_what_is_personal_are_no_profiles(project: Path, env: str) -> None:
    (project / "conf" / env / "globals.yml").write_text("dataset: digits\n")
    (line,) = refusal(project, env=env)
    assert line.startswith(f"'{env}' is no profile, but ")
    assert line.endswith(f"the profiles in conf/ are {', '.join(sorted(SHIPPED))}")


def test_a_copied_profile_that_would_overwrite_the_other_is_refused(project: Path) -> None:
    shutil.copytree(project / "conf/tiny_qwen2_5_vl", project / "conf/mine")
    assert refusal(project, "ingest", env="mine") == [
        "the profile 'mine' would overwrite the results of the profile 'tiny_qwen2_5_vl': write `profile: mine` into "
        "conf/mine/globals.yml"
    ]
    (project / "conf/mine/globals.yml").unlink()
    assert refusal(project, "ingest", env="mine") == [
        "the profile 'mine' does not say where its results go: write `profile: …` and `dataset: …` into "
        "conf/mine/globals.yml"
    ]
    (project / "conf/mine/globals.yml").write_text("profile: mine\ndataset: digits\n")
    run(project, "ingest", env="mine")


@pytest.mark.parametrize("stage", [None, "train@tiny_qwen3_vl"])
def test_under_dvc_what_decides_results_is_not_to_be_in_conf_local(
    project: Path, stage: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = "ingest: {eval_fraction: 0.1, cache_folder: /big/disk}\nevaluate: {seed: 3}\ndata_engine: {batch_rows: 7}\n"
    (project / "conf/local/parameters.yml").write_text(own)
    if stage:
        monkeypatch.setenv("DVC_STAGE", stage)
    run(project, "ingest")
    warnings = [message for message in caplog.messages if "DVC does not see" in message]
    assert len(warnings) == (stage is not None)
    # Neither a place of files, nor a block that the stage does not read.
    assert all("what conf/local sets: after a change of ingest.eval_fraction there, it" in line for line in warnings)


def test_a_wrong_parameter_of_a_later_stage_stops_an_early_one(project: Path) -> None:
    lines = refusal(project, "ingest", params={"train": {"learning_rate": -1}})
    assert lines[1] == "  train.learning_rate: Input should be greater than 0, got -1 (--params)"
    assert not (project / "data").exists()


def test_every_node_is_counted(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qvl_pipeline.hooks.progress")
    run(project)
    names = [node.name for node in register_pipelines()["__default__"].nodes]
    said = [message for name, _, message in caplog.record_tuples if name == "qvl_pipeline.hooks.progress"]
    assert said[:-1] == [f"[{i}/4] {name}" for i, name in enumerate(names, start=1)]
    assert said[-1].startswith("done in ")


@pytest.mark.parametrize("names", [("train",), ("train", "evaluate")])
def test_of_several_nodes_only_the_first_runs_more_than_training(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(lambda train: train, "params:train", None, name="train")
    others = [Node(lambda train: train, "params:train", None, name=name) for name in names[1:]]
    pipeline = Pipeline([node, *others])
    catalog = DataCatalog({"params:train": MemoryDataset(TrainConfig())})
    for name, value in {"NNODES": "2", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    checks = EarlyChecks()
    checks.after_catalog_created({})
    started = ({"project_path": ".", "env": None, "pipeline_names": None}, pipeline, catalog)
    monkeypatch.setenv("PET_NODE_RANK", "0")
    checks.before_pipeline_run(*started)
    monkeypatch.setenv("PET_NODE_RANK", "1")
    if len(names) == 1:
        checks.before_pipeline_run(*started)
        return
    with pytest.raises(UserError, match=r"node 1 of 2 can only join the training: run `kedro run --pipelines train`"):
        checks.before_pipeline_run(*started)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"train": {"freeze_modules": ["visaul"]}}, "freeze_modules: 'visaul' matches no parameter of qwen3_vl"),
        ({"train": {"fp16": True}}, "fp16 needs a GPU, and this machine has none"),
    ],
)
def test_what_training_and_evaluation_would_refuse_is_said_before_the_data_are_made(
    project: Path, params: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = refusal(project, params=params)
    assert line.startswith(reason)
    assert not (project / "data").exists()
    run(project, "ingest", params=params)  # which trains nothing


SAMPLE = Node(lambda samples: samples, "valid_samples", "frames", name="sample_clips")
LATER = {
    "train": Node(lambda frames: frames, "other_frames", "trained_model", name="train"),
    "generate": Node(lambda model: model, "other_model", "predictions", name="generate"),
}


def started(folder: Path, nodes: list[Node], **blocks: Any) -> tuple[EarlyChecks, DataCatalog]:
    """The checks of a run that has just started, on one valid sample, which is for training."""
    path = folder / "valid_samples.parquet"
    pq.write_table(pa.table({"split": ["train"]}), path)
    catalog = DataCatalog({name: MemoryDataset(path) for name in ("valid_samples", "other_frames", "other_model")})
    checks = EarlyChecks()
    checks.after_catalog_created({"valid_samples": {"filepath": str(path)}})
    checks._blocks = blocks
    checks._made_otherwise = lambda name: None
    checks.before_pipeline_run(
        {"project_path": str(folder), "env": None, "pipeline_names": None}, Pipeline(nodes), catalog
    )
    return checks, catalog


@pytest.mark.parametrize(
    ("nodes", "strategy", "reason"),
    [
        (["train", "generate"], "no", "no valid sample is of the split 'eval', which 'evaluate' needs"),
        (["train"], "epoch", "no valid sample is of the split 'eval', which train.eval_strategy 'epoch' needs"),
        (["train"], "no", None),
        ([], "epoch", None),
    ],
)
def test_no_frame_is_decoded_when_there_is_no_sample_for_the_evaluation_that_follows(
    nodes: list[str], strategy: str, reason: str | None, tmp_path: Path
) -> None:
    pipeline = [SAMPLE, *(LATER[name] for name in nodes)]
    checks, catalog = started(tmp_path, pipeline, train=TrainConfig(eval_strategy=strategy))
    with pytest.raises(UserError, match=reason) if reason else contextlib.nullcontext():
        checks.before_node_run(SAMPLE, catalog)


def test_a_wrong_argument_of_generation_is_said_before_the_data_are_made(tmp_path: Path) -> None:
    tokenize = Node(lambda samples: samples, "valid_samples", "tokenized_samples", name="tokenize")
    with pytest.raises(UserError, match=r"evaluate.generation.temperatur is no argument of generation: did you mean"):
        started(tmp_path, [tokenize, LATER["generate"]], evaluate=EvaluateConfig(generation={"temperatur": 1.0}))


def test_a_missing_lmms_eval_is_said_before_the_data_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    tokenize = Node(lambda samples: samples, "valid_samples", "tokenized_samples", name="tokenize")
    with pytest.raises(UserError, match=r"evaluate.lmms_eval asks for chartqa, and the package .* is not installed"):
        started(tmp_path, [tokenize, LATER["generate"]], evaluate=EvaluateConfig(lmms_eval=["chartqa"]))


TRAIN = Node(lambda tokens: tokens, "tokenized_samples", "trained_model", name="train")
GENERATE = Node(lambda *_: None, ["trained_model", "tokenized_samples", "params:evaluate"], None, name="generate")


def start(nodes: list[Node], folder: Path, config: EvaluateConfig, **row: Any) -> None:
    """Call the hook before each node of a run, on one sample of the eval split."""
    row = {"sample_id": "a/0", "source": "a", "split": "eval", "kind": "video", "task": "anls", "answer": "7"} | row
    row["prompt_length"] = 3
    write_tokenized(folder / "tokenized.arrow", [row])
    catalog = DataCatalog(
        {
            "trained_model": MemoryDataset(folder),
            "tokenized_samples": MemoryDataset(folder / "tokenized.arrow"),
            "params:evaluate": MemoryDataset(config, copy_mode="assign"),
        }
    )
    checks = EarlyChecks()
    checks.after_catalog_created({})
    run_params = {"project_path": str(folder), "env": None, "pipeline_names": None}
    checks.before_pipeline_run(run_params, Pipeline(nodes), catalog)
    for node in nodes:
        checks.before_node_run(node, catalog)


@pytest.mark.parametrize(
    ("task", "evaluate", "reason"),
    [
        ("vqa", {}, "sample 'a/0' has the task 'vqa'"),
        ("anls", {"generation": {"temperatur": 1.0}}, "did you mean 'temperature'"),
        ("anls", {"task_by_source": {"b": "anls"}}, "names the source 'b'"),
        ("anls", {"must_not_regress": {"vide": 0.0}}, "names the sample kind 'vide'.* video, overall"),
    ],
)
def test_nothing_is_trained_when_the_evaluation_that_follows_would_fail(
    task: str, evaluate: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = EvaluateConfig(**evaluate)
    with pytest.raises(UserError, match=f"nothing was trained, because 'evaluate'.*{reason}"):
        start([TRAIN, GENERATE], tmp_path, config, task=task)
    with pytest.raises(UserError, match=f"^(?!nothing was trained).*{reason}"):
        start([GENERATE], tmp_path, config, task=task)
    start([TRAIN], tmp_path, config, task=task)


@pytest.mark.parametrize(
    ("nodes", "warnings"), [([TRAIN, GENERATE], 1), ([GENERATE], 1), ([TRAIN], 0)], ids=["both", "evaluate", "train"]
)
def test_answers_that_will_be_cut_are_warned_of_once(
    nodes: list[Node], warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(nodes, tmp_path, EvaluateConfig(max_new_tokens=4), prompt_length=10, length=20)
    assert sum("longer than evaluate.max_new_tokens" in message for message in caplog.messages) == warnings


def test_a_second_run_that_would_train_the_same_profile_is_refused(project: Path) -> None:
    run(project, "ingest", "tokenize")
    place = project / "data/06_models/tiny_qwen3_vl"
    other = lock(place)
    [line] = refusal(project, "train")
    assert line.startswith(f"another run is at the stage 'train', whose results are in {place} too: wait for it or end")
    os.close(other)
    run(project, "train")
    os.close(lock(place))


def test_a_second_run_that_would_ingest_the_same_dataset_waits(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    place = project / "data/02_intermediate/digits"
    place.mkdir(parents=True)
    other = lock(place)
    seen = threading.Event()

    class Noticed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "ingest: waiting for another run, which makes the same in" in record.getMessage():
                assert not (project / "data/01_raw/digits.manifest.json").exists()
                seen.set()
                threading.Timer(0.1, os.close, [other]).start()

    noticed = Noticed()
    logging.getLogger("qvl_pipeline.hooks.one_writer").addHandler(noticed)
    try:
        run(project, "ingest")
    finally:
        logging.getLogger("qvl_pipeline.hooks.one_writer").removeHandler(noticed)
    assert seen.is_set()
    assert (project / "data/01_raw/digits.manifest.json").exists()
    os.close(lock(place))

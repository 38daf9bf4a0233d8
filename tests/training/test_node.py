"""The node `train` from its inputs to the launch, with a stand-in for the processes that it launches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from qvl_pipeline.config import AdapterConfig, BatchingConfig, IngestConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.data.plan.steps import plan_fingerprint
from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.cache import INDEX_SCHEMA
from qvl_pipeline.pipelines.train import nodes
from qvl_pipeline.training import running
from qvl_pipeline.training.launcher import Processes
from qvl_pipeline.training.scratch import leave, note_published
from tests.engine.training import make_training

INGEST = IngestConfig(datasets=[{"name": "a", "path": "a", "data_type": "json"}])
ROW = {"step": 1, "loss": 1.0, "tokens": 10, "tokens_per_second": 5.0}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    """All that `train` gets, of a base model in the folder `pretrained`."""
    pretrained, base_model = tmp_path / "pretrained", tmp_path / "models" / "base"
    build_tiny_model(pretrained, family="qwen3_vl", seed=0, corpus=["which digit?"])
    training = make_training(tmp_path / "data", pretrained, "qwen3_vl", kinds=("text",) * 8, packs_per_step=1)
    model = ModelConfig(processor_type="qwen3_vl", load_from_pretrained_path=str(pretrained))
    base_model.mkdir(parents=True)
    manifest = {"path": str(pretrained), "family": "qwen3_vl", "parameters": model.decisive("tokens")}
    (base_model / "manifest.json").write_text(json.dumps(manifest))
    tokenized = Path(training.data.tokenized)
    fingerprint = plan_fingerprint([tokenized], BatchingConfig(), {"a": 1.0})
    return {
        "base_model": base_model,
        "tokenized_samples": tokenized,
        "stream_samples": tmp_path / "stream.parquet",
        "pack_plan": pd.read_parquet(training.data.pack_plan),
        "plan_summary": {"steps": 8, "epochs": 1.0, "samples_per_epoch": 8.0, "fingerprint": fingerprint},
        "video_frames": Path(training.data.video_frames),
        "preflight_report": {"verdict": "off"},
        "sample": SampleConfig(),
        "model": model,
        "batching": BatchingConfig(),
        "adapter": AdapterConfig(),
        "ingest": INGEST,
    }


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of trainings that were launched; each ended at once, with a result."""
    folders: list[Path] = []

    def launch(spec_path: Path, processes: Processes, on_poll: Callable[[], None]) -> None:
        folders.append(spec_path.parent)
        if processes.nodes.node_rank == 0:
            (spec_path.parent / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
            (spec_path.parent / "result.json").write_text("{}")
            (spec_path.parent / "export").mkdir()
            (spec_path.parent / "checkpoints" / "checkpoint-1").mkdir(parents=True)
            (spec_path.parent / "checkpoints" / "checkpoint-1" / "COMPLETE").touch()

    monkeypatch.setattr(running, "launch", launch)
    return folders


def train(inputs: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    """Run the node and return its result."""
    config = TrainConfig(report_to="none", nproc_per_node=1, **parameters)
    return nodes.train(**inputs, train=config)[3]


def test_a_base_model_replaced_in_place_is_trained_anew(
    inputs: dict[str, Any], launched: list[Path], tmp_path: Path
) -> None:
    first = train(inputs)
    assert train(inputs)["base_model"] == first["base_model"]
    assert len(launched) == 1, "the second only has to publish what the first trained"
    weights = tmp_path / "pretrained" / "model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert train(inputs)["base_model"] != first["base_model"]
    assert len(set(launched)) == 2


def test_what_decided_the_training_goes_where_the_model_goes(
    inputs: dict[str, Any], launched: list[Path], tmp_path: Path
) -> None:
    config = TrainConfig(report_to="none", nproc_per_node=1, learning_rate=3e-4)
    nodes.train(**inputs, train=config)[0](tmp_path / "trained")
    recorded = json.loads((tmp_path / "trained" / "training_parameters.json").read_text())
    assert set(recorded) == {"sample", "model", "batching", "train", "adapter"}
    assert recorded["train"]["learning_rate"] == 3e-4
    assert "nproc_per_node" not in recorded["train"], "decides nothing"


def test_lost_frames_are_named_before_anything_starts(inputs: dict[str, Any], launched: list[Path]) -> None:
    with pa.ipc.new_file(str(inputs["video_frames"] / "index.arrow"), INDEX_SCHEMA) as writer:
        row = {"clip_id": "a.mp4", "shard": "frames-00000.arrow", "batch": 0}
        writer.write_batch(pa.RecordBatch.from_pylist([row], schema=INDEX_SCHEMA))
    with pytest.raises(UserError, match=r"frames-00000.arrow is missing: run `kedro run --pipelines sample`"):
        train(inputs)
    assert launched == []


@pytest.fixture
def second_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(f"PET_{name}", value)


def test_another_node_joins_and_leaves_all_results_to_the_first(
    inputs: dict[str, Any], launched: list[Path], second_node: None
) -> None:
    with pytest.raises(SystemExit) as left:
        train(inputs)
    assert left.value.code == 0
    [folder] = launched
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("resume", "published", "joins"), [("auto", False, False), ("none", False, True), ("auto", True, True)]
)
def test_another_node_joins_where_the_first_has_something_to_train(
    inputs: dict[str, Any],
    launched: list[Path],
    request: pytest.FixtureRequest,
    resume: str,
    published: bool,
    joins: bool,
) -> None:
    train(inputs)
    if published:
        note_published(launched[0])
        leave(launched[0].parent)
    request.getfixturevalue("second_node")
    with pytest.raises(SystemExit):
        train(inputs, resume_from_checkpoint=resume)
    assert launched[1:] == [launched[0]] * joins

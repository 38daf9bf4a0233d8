"""A Kedro project in a temporary folder: the real configuration and package, with nodes that are done at once."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.pipeline import Node, Pipeline

from qvl_pipeline.config import CompareConfig, EvaluateConfig, IngestConfig, ModelConfig, TrainConfig
from qvl_pipeline.families.facts import ModelFacts
from qvl_pipeline.pipeline_registry import STAGES

REPOSITORY = Path(__file__).parents[1]
TINY = ["tiny_qwen2_5_vl", "tiny_qwen3_5", "tiny_qwen3_vl", "tiny_qwen3_vl_lora", "tiny_qwen3_vl_moe"]
REAL = [
    *("qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_vl_72b"),
    *("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b"),
    *("qwen3_5_4b", "qwen3_5_9b", "qwen3_5_27b"),
    *("qwen3_vl_30b_a3b", "qwen3_vl_235b_a22b", "qwen3_5_35b_a3b", "qwen3_5_122b_a10b"),
    *("frozen_vision", "long_video"),
]
ADAPTED = ["qwen2_5_vl_7b_lora", "qwen3_vl_8b_lora", "qwen3_vl_8b_qlora"]
HEARING = ["qwen2_5_omni_7b", "tiny_qwen2_5_omni"]
SHIPPED = REAL + ADAPTED + TINY + HEARING
# A seed with which the training takes a second.
WAITS = 1234
# And one with which it fails by a bug.
FAILS = 4321
METRICS = {
    "base": {"video": {"exact_match": 0.1, "n": 3}},
    "trained": {"video": {"exact_match": 0.9, "n": 3}, "kind?": {"exact_match": 1}, "": {"exact_match": 0}},
}


def profile_named(facts: ModelFacts) -> str:
    """Name of the profile of a published model, where there is one."""
    return f"{facts.family.removesuffix('_moe')}_{facts.size.lower().replace('-', '_')}"


def make_project(folder: Path) -> Path:
    """Create the project; its package is the installed one."""
    (folder / "src").mkdir(parents=True)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    shutil.copy(REPOSITORY / ".telemetry", folder)
    (folder / "conf" / "local").mkdir(parents=True)
    shutil.copy(REPOSITORY / "conf" / "logging.yml", folder / "conf")
    for name in ("base", *SHIPPED):  # and no profile of one's own
        shutil.copytree(REPOSITORY / "conf" / name, folder / "conf" / name)
    return folder


def use_quick_nodes(folder: Path) -> None:
    """Set Kedro up for the project, with the pipelines of this module."""
    bootstrap_project(folder)
    pipelines.configure(__name__)


def run(folder: Path, *names: str, env: str | None = None, params: dict[str, Any] | None = None) -> None:
    """Run pipelines of the project in a session, as `kedro run` does."""
    with KedroSession.create(project_path=folder, env=env, runtime_params=params) as session:
        session.run(pipeline_names=list(names))


def register_pipelines() -> dict[str, Pipeline]:
    """Return pipelines of the real names, with two nodes to fail or to wait in by parameter."""
    nodes = {
        "ingest": Node(_ingest, "params:ingest", "raw_manifest", name="ingest"),
        "tokenize": Node(_tokenize, "raw_manifest", ["plan_summary", "base_model"], name="tokenize"),
        "train": Node(
            _train, ["base_model", "plan_summary", "params:train"], ["trained_model", "train_result"], name="train"
        ),
        "evaluate": Node(
            _evaluate, ["train_result", "params:model", "params:evaluate"], ["metrics", "predictions"], name="evaluate"
        ),
    }
    stages = {stage: Pipeline([nodes[stage]] if stage in nodes else []) for stage in STAGES}
    compare = Pipeline([Node(_compare, "params:compare", None, name="compare", tags="not_recorded")])
    return {**stages, "compare": compare, "__default__": sum(stages.values(), start=Pipeline([]))}


def _ingest(ingest: IngestConfig) -> dict[str, Any]:
    files = [{"source": source.name, "path": source.path, "sha256": "0" * 64} for source in ingest.datasets]
    return {"fingerprint": "data-1", "files": [file for file in files if Path(file["path"]).exists()]}


def _tokenize(raw_manifest: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "manifest.json").write_text('{"path": ".", "family": "qwen3_vl"}')

    return {"fingerprint": f"plan of {raw_manifest['fingerprint']}"}, write


def _train(base_model: Path, plan_summary: dict[str, Any], train: TrainConfig) -> tuple[Any, dict[str, Any]]:
    import mlflow

    if train.seed == FAILS:
        raise ZeroDivisionError("a bug")
    if train.seed == WAITS:
        time.sleep(1)
    active = mlflow.active_run()  # none on other nodes than the first
    return _write_model, {"mlflow_run_id": active.info.run_id if active else None}


def _write_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")


def _evaluate(
    train_result: dict[str, Any], model: ModelConfig, evaluate: EvaluateConfig
) -> tuple[dict[str, Any], pd.DataFrame]:
    return METRICS, pd.DataFrame({"sample_id": ["a/0"]})


def _compare(compare: CompareConfig) -> None:
    import mlflow

    mlflow.search_experiments()

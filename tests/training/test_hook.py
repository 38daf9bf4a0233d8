"""What of a training is deleted when: checkpoints after its result is saved, the export after the command is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.evaluate.pipeline import create_pipeline as create_evaluate
from qvl_pipeline.pipelines.train.pipeline import create_pipeline as create_train
from qvl_pipeline.training.hook import PublicationHook


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The scratch folder of a training whose model is in its place."""
    run = tmp_path / "scratch" / "abc"
    for part in ("export/model.safetensors", "checkpoints/checkpoint-9/COMPLETE", "metrics.jsonl", "result.json"):
        (run / part).parent.mkdir(parents=True, exist_ok=True)
        (run / part).touch()
    return run


@pytest.fixture
def hook(tmp_path: Path) -> PublicationHook:
    hook = PublicationHook()
    hook.after_catalog_created({"base_model": {"filepath": str(tmp_path / "base")}})
    return hook


def left(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()} - {"metrics.jsonl", "result.json"}


def test_checkpoints_go_with_the_result_and_the_export_with_the_command(run: Path, hook: PublicationHook) -> None:
    hook.after_dataset_saved("training_metrics", None)
    assert left(run) == {"export", "checkpoints"}
    hook.after_dataset_saved("train_result", {"training": "abc"})
    assert left(run) == {"export", "PUBLISHED"}
    hook.on_pipeline_error()
    assert left(run) == {"export", "PUBLISHED"}, "the evaluation failed: the same command need not train again"
    hook.after_pipeline_run(create_train())
    assert left(run) == {"PUBLISHED"}


def test_the_evaluation_of_its_own_command_ends_a_publication_too(run: Path, hook: PublicationHook) -> None:
    hook.after_dataset_saved("train_result", {"training": "abc"})
    hook.after_pipeline_run(Pipeline([Node(lambda: 1, None, "samples")]))
    assert left(run) == {"export", "PUBLISHED"}
    hook.after_pipeline_run(create_evaluate())
    assert left(run) == {"PUBLISHED"}

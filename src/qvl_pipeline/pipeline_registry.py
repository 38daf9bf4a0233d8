"""The project's pipelines: one for each stage, and all of them in order as the default."""

from __future__ import annotations

from importlib import import_module

from kedro.pipeline import Pipeline

STAGES = ("ingest", "validate", "sample", "tokenize", "train", "evaluate")


def register_pipelines() -> dict[str, Pipeline]:
    """Return the pipeline of every stage, and `__default__`, the whole chain.

    The names are listed instead of found: Kedro's `find_pipelines` returns only the requested pipelines, and leaves out
    those that fail to import.
    """
    stages = {stage: import_module(f"qvl_pipeline.pipelines.{stage}.pipeline").create_pipeline() for stage in STAGES}
    return {**stages, "__default__": sum(stages.values(), start=Pipeline([]))}

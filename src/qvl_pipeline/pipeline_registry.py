"""The project's pipelines: one for each stage, all of them in order as the default, and those that are no stage."""

from __future__ import annotations

from importlib import import_module

from kedro.pipeline import Pipeline

STAGES = ("ingest", "validate", "sample", "tokenize", "train", "evaluate")
TOOLS = ("preflight", "compare", "sync_metrics", "replay")


def register_pipelines() -> dict[str, Pipeline]:
    """Return the pipeline of every stage, those that are no stage, and `__default__`, the chain of all stages.

    The names are listed instead of found: Kedro's `find_pipelines` returns only the requested pipelines, and leaves out
    those that fail to import.
    """
    stages, tools = (
        {name: import_module(f"qvl_pipeline.pipelines.{name}.pipeline").create_pipeline() for name in names}
        for names in (STAGES, TOOLS)
    )
    # A stage is a namespace, of nodes alone: Kedro-Viz draws it as one box, which a click opens.
    stages = {
        name: Pipeline(stage, namespace=name, prefix_datasets_with_namespace=False) for name, stage in stages.items()
    }
    return {**stages, **tools, "__default__": sum(stages.values(), start=Pipeline([]))}

"""Wiring of the pipeline `compare`, which is no stage: it reads MLflow, and has no MLflow run of its own."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.compare.nodes import write_comparison


def create_pipeline() -> Pipeline:
    """Create the pipeline: recorded trainings in, one page out."""
    return Pipeline(
        [Node(write_comparison, "params:compare", "comparison", name="write_comparison", tags="not_recorded")]
    )

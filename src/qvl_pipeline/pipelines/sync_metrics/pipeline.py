"""Wiring of the pipeline `sync_metrics`, which is no stage: it makes no data and has no MLflow run of its own."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.sync_metrics.nodes import sync_metrics


def create_pipeline() -> Pipeline:
    """Create the pipeline: what MLflow has not got of earlier runs goes there."""
    return Pipeline([Node(sync_metrics, inputs=None, outputs="sync_report", name="sync_metrics", tags="not_recorded")])

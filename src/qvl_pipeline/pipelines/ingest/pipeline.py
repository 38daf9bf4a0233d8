"""Wiring of the `ingest` stage."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.ingest.nodes import ingest_rows, prepare_raw


def create_pipeline() -> Pipeline:
    """Create the pipeline: declared sources in, samples and rejects out."""
    return Pipeline(
        [
            Node(prepare_raw, inputs="params:ingest", outputs="raw_manifest", name="prepare_raw"),
            Node(
                ingest_rows,
                inputs=["params:ingest", "raw_manifest", "params:data_engine"],
                outputs=["samples", "rejects"],
                name="ingest",
            ),
        ]
    )

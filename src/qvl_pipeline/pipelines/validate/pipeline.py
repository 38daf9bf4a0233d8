"""Wiring of the `validate` stage."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.validate.nodes import keep_valid, validate_rows, write_page


def create_pipeline() -> Pipeline:
    """Create the pipeline: samples in, valid samples, quarantine, media index and report out."""
    return Pipeline(
        [
            Node(
                validate_rows,
                inputs=["samples", "rejects", "params:validate", "params:ingest", "params:data_engine"],
                outputs=["quarantine", "validation_warnings", "media_index", "validation_report"],
                name="validate",
            ),
            Node(
                write_page,
                inputs=[
                    "samples",
                    "rejects",
                    "quarantine",
                    "validation_warnings",
                    "media_index",
                    "validation_report",
                    "params:validate",
                    "params:data_engine",
                ],
                outputs="validation_page",
                name="write_validation_page",
            ),
            Node(
                keep_valid,
                inputs=[
                    "samples",
                    "quarantine",
                    "validation_report",
                    "validation_page",
                    "params:validate",
                    "params:data_engine",
                ],
                outputs="valid_samples",
                name="keep_valid",
            ),
        ]
    )

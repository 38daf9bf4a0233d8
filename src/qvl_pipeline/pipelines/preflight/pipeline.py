"""Wiring of the pipeline `preflight`, which is no stage: it needs nothing but parameters."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.preflight.nodes import preflight_of_profile


def create_pipeline() -> Pipeline:
    """Create the pipeline: parameters, and the plan if there is one, in; page and report out."""
    return Pipeline(
        [
            Node(
                preflight_of_profile,
                inputs=[
                    "model_input",
                    "params:sample",
                    "params:model",
                    "params:batching",
                    "params:train",
                    "params:adapter",
                    "params:preflight",
                ],
                outputs=["preflight_page", "preflight_report"],
                name="preflight_of_profile",
            )
        ]
    )

"""Wiring of the pipeline `replay`, which is no stage: its runs in MLflow are those of the stages it repeats."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.replay.nodes import refuse_differences, repeat


def create_pipeline() -> Pipeline:
    """Create the pipeline: a run in, a report of what differs in its repetition out."""
    return Pipeline(
        [
            Node(repeat, inputs="params:replay", outputs="replay_report", name="repeat", tags="not_recorded"),
            Node(
                refuse_differences,
                inputs="replay_report",
                outputs=None,
                name="refuse_differences",
                tags="not_recorded",
            ),
        ]
    )

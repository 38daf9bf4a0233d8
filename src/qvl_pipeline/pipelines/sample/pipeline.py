"""Wiring of the `sample` stage."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.sample.nodes import sample_clips


def create_pipeline() -> Pipeline:
    """Create the pipeline: valid samples in, the frames of their clips out."""
    return Pipeline(
        [
            Node(
                sample_clips,
                inputs=["valid_samples", "media_index", "params:sample", "params:model"],
                outputs="video_frames",
                name="sample_clips",
            )
        ]
    )

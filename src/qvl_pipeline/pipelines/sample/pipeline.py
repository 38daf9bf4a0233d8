"""Wiring of the `sample` stage."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.sample.nodes import keep_sampled, quarantine_samples, sample_clips


def create_pipeline() -> Pipeline:
    """Create the pipeline: valid samples in, the frames of their clips and the samples that have them out."""
    return Pipeline(
        [
            Node(
                sample_clips,
                inputs=["valid_samples", "media_index", "params:sample", "params:model", "params:data_engine"],
                outputs="video_frames",
                name="sample_clips",
            ),
            Node(
                quarantine_samples,
                inputs=["valid_samples", "video_frames"],
                outputs=["sample_quarantine", "sample_report"],
                name="quarantine_samples",
            ),
            Node(
                keep_sampled,
                inputs=["valid_samples", "sample_quarantine", "params:sample", "params:model"],
                outputs="sampled_samples",
                name="keep_sampled",
            ),
        ]
    )

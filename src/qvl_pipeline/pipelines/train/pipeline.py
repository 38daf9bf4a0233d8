"""Wiring of the `train` stage."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.train.nodes import preflight, train


def create_pipeline() -> Pipeline:
    """Create the pipeline: plan and base model in, what it needs and the trained model out."""
    return Pipeline(
        [
            Node(
                preflight,
                inputs=[
                    "base_model",
                    "tokenized_samples",
                    "pack_plan",
                    "video_frames",
                    "params:sample",
                    "params:model",
                    "params:batching",
                    "params:train",
                    "params:adapter",
                    "params:preflight",
                ],
                outputs=["preflight_page", "preflight_report"],
                name="preflight",
            ),
            Node(
                train,
                inputs=[
                    "base_model",
                    "tokenized_samples",
                    "stream_samples",
                    "pack_plan",
                    "plan_summary",
                    "video_frames",
                    "preflight_report",
                    "params:sample",
                    "params:model",
                    "params:batching",
                    "params:train",
                    "params:adapter",
                    "params:ingest",
                ],
                outputs=["trained_model", "kept_checkpoints", "training_metrics", "train_result"],
                name="train",
            ),
        ]
    )

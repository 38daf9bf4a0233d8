"""Wiring of the `tokenize` stage."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.tokenize.nodes import plan, prepare_base_model, preview, tokenize


def create_pipeline() -> Pipeline:
    """Create the pipeline: sampled samples in; base model, token ids, pack plan and label preview out."""
    return Pipeline(
        [
            Node(
                prepare_base_model,
                inputs=["sampled_samples", "params:model"],
                outputs="base_model",
                name="prepare_base_model",
            ),
            Node(
                tokenize,
                inputs=[
                    "sampled_samples",
                    "media_index",
                    "video_frames",
                    "base_model",
                    "params:model",
                    "params:batching",
                    "params:data_engine",
                ],
                # In this order: the last is known once the first is written.
                outputs=["tokenized_samples", "stream_samples", "tokenize_quarantine"],
                name="tokenize",
            ),
            Node(
                plan,
                inputs=[
                    "tokenized_samples",
                    "stream_samples",
                    "tokenize_quarantine",
                    "params:batching",
                    "params:ingest",
                ],
                outputs=["pack_plan", "plan_summary"],
                name="plan",
            ),
            Node(
                preview,
                inputs=["tokenized_samples", "plan_summary", "base_model", "video_frames", "params:model"],
                outputs=["token_statistics", "label_preview"],
                name="preview",
            ),
        ]
    )

"""Wiring of the `evaluate` stage."""

from __future__ import annotations

from kedro.pipeline import Node, Pipeline

from qvl_pipeline.pipelines.evaluate.nodes import (
    complete_card,
    generate,
    measure,
    refuse_regressions,
    write_report,
    write_samples,
)


def create_pipeline() -> Pipeline:
    """Create the pipeline: models and tokenized samples in, predictions, metrics and report out."""
    return Pipeline(
        [
            Node(
                generate,
                inputs=[
                    "base_model",
                    "trained_model",
                    "kept_checkpoints",
                    "tokenized_samples",
                    "sampled_samples",
                    "video_frames",
                    "plan_summary",
                    "train_result",
                    "params:model",
                    "params:evaluate",
                ],
                outputs=["predictions", "metrics", "evaluation_slices"],
                name="generate",
            ),
            Node(
                measure,
                # After the answers: what fails here loses none of them.
                inputs=[
                    "base_model",
                    "trained_model",
                    "kept_checkpoints",
                    "metrics",
                    "params:model",
                    "params:evaluate",
                ],
                outputs="lmms_eval_results",
                name="measure",
            ),
            Node(
                write_report,
                inputs=[
                    "metrics",
                    "lmms_eval_results",
                    "predictions",
                    "training_metrics",
                    "train_result",
                    "plan_summary",
                    "validation_report",
                    "tokenized_samples",
                    "video_frames",
                    "evaluation_slices",
                    "trained_model",
                    "params:model",
                    "params:evaluate",
                ],
                outputs="report",
                name="write_report",
            ),
            Node(
                write_samples,
                inputs=["predictions", "tokenized_samples", "video_frames", "params:model", "params:evaluate"],
                outputs="samples_page",
                name="write_samples",
            ),
            Node(complete_card, inputs=["trained_model", "metrics"], outputs="model_card", name="complete_card"),
            Node(
                refuse_regressions,
                inputs=["metrics", "predictions", "report", "params:evaluate"],
                outputs=None,
                name="refuse_regressions",
            ),
        ]
    )

"""Parameters of the pipeline `replay`."""

from __future__ import annotations

from qvl_pipeline.config.base import Block


class ReplayConfig(Block):
    """Block `replay`.

    Attributes:
        run_id: MLflow run of the training to repeat. `--params run_id=<id>` is short for `--params replay.run_id=<id>`.
    """

    run_id: str = ""

"""Parameters of the `evaluate` stage."""

from __future__ import annotations

from pydantic import Field

from qvl_pipeline.config.base import Block


class EvaluateConfig(Block):
    """Generation on the eval split with the base and the trained model.

    Attributes:
        batch_size: Prompts generated together (left-padded).
        max_new_tokens: Longest answer in tokens.
        max_samples: Most samples evaluated, spread evenly over the eval split; `None` takes all of it.
        compare_base: Evaluate the untrained base model too, for the gain.
        report_title: Heading of the report; `None` takes the name of the model.
    """

    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    max_samples: int | None = Field(default=None, ge=1)
    compare_base: bool = True
    report_title: str | None = None

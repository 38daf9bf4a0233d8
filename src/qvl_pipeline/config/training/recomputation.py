"""Parameters of gradient checkpointing, tower by tower."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block

Recomputed = Literal["none", "selective", "full"]


class GradientCheckpointingConfig(Block):
    """Which activations are recomputed in the backward pass, where `true` or a list of towers says too little.

    Attributes:
        llm: `full` keeps the input of each block of the language model and computes all else twice; `selective` also
            keeps what its matrix products and its attention put out, so that only norms, rotary embeddings and
            activation functions are computed twice; `none` keeps everything.
        vit: The same of the vision tower.
        every: Recompute only every n-th block of a tower, the first of them included; the others keep everything.
        offload: Keep the inputs of recomputed blocks in the CPU's memory until the backward pass.
    """

    llm: Recomputed = "none"
    vit: Recomputed = "none"
    every: int = Field(default=1, ge=1)
    offload: bool = False

    @model_validator(mode="after")
    def _some_tower_is_named(self) -> GradientCheckpointingConfig:
        if self.llm == self.vit == "none" and (self.every > 1 or self.offload):
            raise ValueError("every and offload are for recomputed towers: set llm or vit to full or selective")
        return self


NOTHING_RECOMPUTED = GradientCheckpointingConfig()
ALL_RECOMPUTED = GradientCheckpointingConfig(llm="full", vit="full")

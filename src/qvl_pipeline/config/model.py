"""Parameters that say which model is trained; shared by `sample`, `tokenize`, `train` and `evaluate`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block

Family = Literal["qwen3_vl", "qwen2_5_vl"]
Attention = Literal["auto", "flash_attention_2", "flash_attention_3", "torch_varlen", "sdpa", "eager"]


class ModelConfig(Block):
    """Parameters of the model and its processor.

    Attributes:
        processor_type: Model family.
        load_from_pretrained_path: Hub id or local folder of the base model; `None` builds the tiny model of the family.
        processor_name: Hub id or local folder of the processor; `None` takes the model's own.
        tiny_seed: Seed of the tiny model's weights; only read when `load_from_pretrained_path` is `None`.
        attn_implementation: Attention kernel; `auto` takes the fastest that runs here and says which.
        vit_attn_implementation: Attention kernel of the vision tower in training; `None` is the same.
        image_min_pixels: Fewest pixels an image is scaled up to.
        image_max_pixels: Most pixels an image is scaled down to.
    """

    processor_type: Family
    load_from_pretrained_path: str | None = None
    processor_name: str | None = None
    tiny_seed: int = 0
    attn_implementation: Attention = "auto"
    vit_attn_implementation: Attention | None = None
    image_min_pixels: int = Field(default=56 * 56, ge=1)
    image_max_pixels: int = Field(default=1280 * 28 * 28, ge=1)

    @model_validator(mode="after")
    def _pixel_limits(self) -> ModelConfig:
        if self.image_min_pixels > self.image_max_pixels:
            raise ValueError(
                f"image_min_pixels ({self.image_min_pixels}) is above image_max_pixels ({self.image_max_pixels})"
            )
        if self.processor_name and not self.load_from_pretrained_path:
            raise ValueError("processor_name needs load_from_pretrained_path: the tiny model has its own processor")
        return self

    def decisive(self) -> dict[str, Any]:
        """Return what decides the frames of clips, by its patch size; `prepared` has what decides the tokens."""
        return {"processor_type": self.processor_type}

    def prepared(self) -> dict[str, object]:
        """Return what decides the base model and the tokens; attention is chosen anew by every stage."""
        return self.model_dump(mode="json", exclude={"attn_implementation", "vit_attn_implementation"})

    @property
    def patch_size(self) -> int:
        """Side of one vision patch in pixels."""
        return {"qwen3_vl": 16, "qwen2_5_vl": 14}[self.processor_type]

"""Parameters that say which model is trained; shared by `sample`, `tokenize`, `train` and `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block, Indifferent
from qvl_pipeline.families import FAMILIES, ModelFamily

Family = Literal[tuple(FAMILIES)]
Attention = Literal["auto", "flash_attention_2", "flash_attention_3", "torch_varlen", "sdpa", "eager"]


def _default_max_pixels(values: dict[str, Any]) -> int:
    # A family that is none has an error of its own.
    family = FAMILIES.get(values.get("processor_type", ""))
    return 1280 * family.token_pixels if family else 1


class ModelConfig(Block):
    """Parameters of the model and its processor.

    Of these, frames of clips depend on the family alone (its patch size), and tokens on all but the attention kernels.

    Attributes:
        processor_type: Model family.
        load_from_pretrained_path: Hub id or local folder of the base model; `None` builds the tiny model of the family.
        processor_name: Hub id or local folder of the processor; `None` takes the model's own.
        tiny_seed: Seed of the tiny model's weights; only read when `load_from_pretrained_path` is `None`.
        attn_implementation: Attention kernel; `auto` takes the fastest that runs here and says which.
        vit_attn_implementation: Attention kernel of the vision tower in training; `None` is the same.
        linear_attn_implementation: Kernels of linear attention, where a family has it (Qwen3.5): `fla` is the packages
            flash-linear-attention and causal-conv1d on a GPU; `torch` needs neither, and trains 1.5 to 2.5 times slower
            there. `auto` takes `fla` on a GPU, and refuses to start where a package is missing.
        experts_implementation: How experts are computed, where a family has any (those called MoE): `grouped_mm` is one
            product for all of them, `eager` one after the other; `auto` takes the former where it runs.
        thinking: How conversations are trained on whose earlier thoughts (or empty ones) the chat template leaves out
            once they go on. `each_turn` makes a prompt of its own of each answer that comes out differently later, as
            the model is served, and the plan says how many; `last_turn_only` trains on no answer but the last. Of the
            eval split it is always the last, which is the one that is evaluated.
        ignore_empty_think: Leave empty thoughts before answers out of the loss: they are part of the prompt, as when
            the model is served with thinking off (`enable_thinking: false`).
        image_min_pixels: Fewest pixels an image is scaled up to.
        image_max_pixels: Most pixels an image is scaled down to; by default those of 1,280 tokens, 1,003,520 for
            Qwen2.5-VL (28 x 28 each) and 1,310,720 for Qwen3-VL (32 x 32).
    """

    processor_type: Family
    load_from_pretrained_path: Annotated[str | None, Indifferent("frames")] = None
    processor_name: Annotated[str | None, Indifferent("frames")] = None
    tiny_seed: Annotated[int, Indifferent("frames")] = 0
    attn_implementation: Annotated[Attention, Indifferent("frames"), Indifferent("tokens")] = "auto"
    vit_attn_implementation: Annotated[Attention | None, Indifferent("frames"), Indifferent("tokens")] = None
    linear_attn_implementation: Annotated[
        Literal["auto", "fla", "torch"], Indifferent("frames"), Indifferent("tokens")
    ] = "auto"
    experts_implementation: Annotated[
        Literal["auto", "grouped_mm", "eager"], Indifferent("frames"), Indifferent("tokens")
    ] = "auto"
    thinking: Annotated[Literal["each_turn", "last_turn_only"], Indifferent("frames")] = "each_turn"
    ignore_empty_think: Annotated[bool, Indifferent("frames")] = True
    image_min_pixels: Annotated[int, Indifferent("frames")] = Field(default=56 * 56, ge=1)
    image_max_pixels: Annotated[int, Indifferent("frames")] = Field(default_factory=_default_max_pixels, ge=1)

    @model_validator(mode="after")
    def _pixel_limits(self) -> ModelConfig:
        if self.image_min_pixels > self.image_max_pixels:
            raise ValueError(
                f"image_min_pixels ({self.image_min_pixels}) is above image_max_pixels ({self.image_max_pixels})"
            )
        if self.processor_name and not self.load_from_pretrained_path:
            raise ValueError("processor_name needs load_from_pretrained_path: the tiny model has its own processor")
        if "tiny_seed" in self.model_fields_set and self.load_from_pretrained_path:
            raise ValueError("tiny_seed is for the tiny model, and load_from_pretrained_path names another: drop one")
        if self.image_max_pixels < self.family.token_pixels:
            raise ValueError(
                f"image_max_pixels ({self.image_max_pixels}) is less than the {self.family.token_pixels} pixels that "
                f"one token of {self.family.title} stands for: raise it"
            )
        return self

    @property
    def family(self) -> ModelFamily:
        """What is known of the family."""
        return FAMILIES[self.processor_type]

"""Parameters of the pipeline `preflight`: on what a training is to run, and what that costs."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qvl_pipeline.config.base import Block

HARDWARE = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<gpus>\d+)x(?P<name>[A-Za-z][A-Za-z0-9 ]*?)(?:-(?P<gb>\d+)GB)?")


class PreflightConfig(Block):
    """What a training needs, asked before it starts.

    Attributes:
        mode: `refuse` ends `train` where the training cannot fit, the error of the estimate allowed for; `warn` only
            says so; `off` asks nothing. `preflight: off` is short for `preflight: {mode: off}`.
        hardware: GPUs of a node and their name, such as `8xH100-80GB`, with the nodes before them, as in
            `2x8xH100-80GB`; `auto` is this machine. `--params hardware=…` is short for `preflight.hardware`.
        gpu_hour_price: Price of an hour of one GPU, in any currency; 0 leaves the cost out.
        mfu: Share of a GPU's peak that training reaches, where no training on such a GPU is recorded; 0 takes the usual
            one, 0.3.
    """

    mode: Literal["refuse", "warn", "off"] = "refuse"
    hardware: str = "auto"
    gpu_hour_price: float = Field(default=0.0, ge=0)
    mfu: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_mode(cls, values: Any) -> Any:
        return {"mode": "off"} if values is False or values == "off" else values  # YAML reads `off` as false

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value

    @field_validator("hardware")
    @classmethod
    def _is_hardware(cls, value: str) -> str:
        if value != "auto" and not HARDWARE.fullmatch(value):
            raise ValueError(f"hardware is '{value}': write it as 8xH100-80GB, or 2x8xH100-80GB for two nodes")
        return value

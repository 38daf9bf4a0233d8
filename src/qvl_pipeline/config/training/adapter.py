"""Parameters of adapters: a low-rank update that is trained in place of the model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from qvl_pipeline.config.base import Block
from qvl_pipeline.config.training.train import Part

AdaptedPart = Literal["vit", "merger", "deepstack", "visual", "llm", "audio", "audio_projector"]

_OF_QUANTIZATION = ("quantize_base", "double_quant", "quantize_parts")


class AdapterConfig(Block):
    """Train a low-rank update of some layers instead of the model, which stays bit-unchanged.

    Attributes:
        type: `none` trains the model itself; `lora`, or `dora`, which also trains the length of each row.
        r: Rank of the update.
        alpha: Factor on the update, which is divided by the rank.
        rslora: Divide by the root of the rank instead: keeps the size of the update the same at high ranks.
        dropout: Share of the inputs of the update that are dropped in training.
        init: How the update starts: `zeros_b` at zero; `pissa` at the principal part of each matrix (`lora` only). With
            either, the first step is that of the base model.
        targets: What to adapt, for each part (`llm`, `vit`, `merger`, `deepstack`, or `visual` for these three; `audio`
            and `audio_projector` of a model that hears): `all` of its linear layers, `none`, or a list of kinds
            (`attention`, `mlp`; `experts`, each of which gets an update of its own) and globs over names of layers and
            of fused tensors of experts. Parts that are not named are not adapted. What matches nothing is an error.
        train_fully: Parts trained in full beside the update: names as in `train.freeze_modules`, such as `merger`,
            `embed` or `head`, or globs over parameter names.
        learning_rates: Peak learning rates as in `train.learning_rates`, and of `lora_b`, all second matrices of the
            update (LoRA+). A key may be in one of the two only.
        start_from: Local folder of an adapter in peft's format to go on from, of the same type, rank and layers.
        quantize_base: `nf4` holds the frozen matrices of `quantize_parts` in four bits a number (QLoRA). Exported is an
            adapter of the base model as it is, and merged into that.
        double_quant: Hold the scale of each block of 64 numbers in eight bits instead of 32.
        quantize_parts: Parts whose linear layers are quantised, adapted or not, named as in `targets`.
        export: `adapter` writes the update alone, in peft's format, to the folder `adapter` of the trained model;
            `merged` a plain model with the update in its weights; `both` writes both.
    """

    type: Literal["none", "lora", "dora"] = "none"
    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init: Literal["zeros_b", "pissa"] = "zeros_b"
    targets: dict[AdaptedPart, Literal["all", "none"] | list[str]] = Field(default_factory=lambda: {"llm": "all"})
    train_fully: list[str] = Field(default_factory=list)
    learning_rates: dict[Part | Literal["lora_b"], PositiveFloat] = Field(default_factory=dict)
    start_from: str = ""
    quantize_base: Literal["none", "nf4"] = "none"
    double_quant: bool = True
    quantize_parts: list[AdaptedPart] = Field(default_factory=lambda: ["llm"], min_length=1)
    export: Literal["adapter", "merged", "both"] = "both"

    def decisive(self, of: str | None = None) -> dict[str, Any]:
        """Return what decides the weights; without an adapter nothing does, and unquantised not how it would be."""
        if self.type == "none":
            return {"type": "none"}
        unused = () if self.quantizes else _OF_QUANTIZATION
        return {name: value for name, value in super().decisive(of).items() if name not in unused}

    @property
    def quantizes(self) -> bool:
        """Whether part of the model that is adapted is quantised."""
        return self.type != "none" and self.quantize_base != "none"

    @model_validator(mode="after")
    def _type_is_chosen(self) -> AdapterConfig:
        if "type" not in self.model_fields_set and self.model_fields_set:
            given = ", ".join(sorted(self.model_fields_set))
            raise ValueError(
                f"{given} without a type would train the whole model: set type to lora or dora, or to none"
            )
        return self

    @model_validator(mode="after")
    def _quantization_is_asked_for(self) -> AdapterConfig:
        if self.type == "none" and self.quantize_base != "none":
            raise ValueError(
                f"quantize_base '{self.quantize_base}' needs an adapter, for quantised weights cannot be trained: set "
                "type to lora or dora, or quantize_base to none"
            )
        given = [name for name in ("double_quant", "quantize_parts") if name in self.model_fields_set]
        if given and "quantize_base" not in self.model_fields_set:
            raise ValueError(f"{given[0]} means nothing without a quantised base: set quantize_base to nf4, or to none")
        return self

    @model_validator(mode="after")
    def _start_is_possible(self) -> AdapterConfig:
        if self.init == "pissa" and self.type == "dora":
            raise ValueError(
                "init 'pissa' is for type 'lora': its rows start at other lengths than dora's; use zeros_b"
            )
        if self.init == "pissa" and self.start_from:
            raise ValueError("init 'pissa' and start_from are two ways to start: choose one")
        return self

    @model_validator(mode="after")
    def _something_is_adapted(self) -> AdapterConfig:
        if not any(wanted and wanted != "none" for wanted in self.targets.values()):
            raise ValueError("targets names no part to adapt: name one, such as {llm: all}")
        return self


NO_ADAPTER = AdapterConfig()

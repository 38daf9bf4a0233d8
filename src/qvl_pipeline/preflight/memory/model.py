"""The model of a run on the meta device, as the engine would prepare it, and a cut of it with every kind of block."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from qvl_pipeline.engine.model.adapters.frozen import quantized_layers
from qvl_pipeline.engine.model.adapters.injection import inject, quantize_base
from qvl_pipeline.engine.model.attention.linear import use_packed_linear_attention
from qvl_pipeline.engine.model.attention.packed import use_kernels
from qvl_pipeline.engine.model.freezing import freeze
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.model.weights import read_config, skeleton_of
from qvl_pipeline.engine.parallel.sharding import compute_dtype
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.facts import MODELS
from qvl_pipeline.preflight.memory.stand_ins import STAND_INS, use_fused_blocks

_MEAN_AND_STD = [0.5] * 3


@dataclass(frozen=True)
class Kernels:
    """What the model computes with on the device that is asked about.

    Attributes:
        device: `cuda` or `cpu`.
        text: Attention kernel of the language model.
        vision: Attention kernel of the vision tower.
        fused: Whether norms and gated MLPs are fused, by Liger or by `torch.compile`.
        experts: Kernel of experts, where there are some.
    """

    device: str
    text: str
    vision: str
    fused: bool
    experts: str = "grouped_mm"


@dataclass(frozen=True)
class _Group:
    """Ranks that share a pack, of which there is only this one."""

    degree: int

    def size(self) -> int:
        return self.degree

    def rank(self) -> int:
        return 0


def config_of(path: str) -> PreTrainedConfig:
    """Return the configuration of a model: of a published one without a network."""
    if not Path(path).exists() and path in MODELS:
        return AutoConfig.for_model(**MODELS[path].config())
    return read_config(path)


def prepare(spec: TrainSpec, config: PreTrainedConfig, kernels: Kernels) -> PackedVLM:
    """Build the model of a run on the meta device, in the type of the computation.

    Raises:
        ValueError: A part that is to be frozen or adapted is not there.
    """
    family, hf = FAMILIES[spec.model.family], skeleton_of(copy.deepcopy(config))
    hf.train()
    use_linear_patch_embedding(hf)
    degree = spec.parallel.sp_ulysses_degree
    group: Any = _Group(degree) if degree > 1 else None
    rmpad = spec.data.use_rmpad
    use_kernels(hf, kernels.text, kernels.vision, STAND_INS, rmpad=rmpad, sp_group=group, called="_stand_in")
    if family.experts:
        hf.config.text_config._experts_implementation_internal = kernels.experts
    if family.linear_attention:  # the packages' kernels keep less
        half = spec.parallel.half
        use_packed_linear_attention(hf, family, "torch", torch.device("cpu"), half=half, sp_group=group)
    freeze(hf, family, spec.model.freeze_modules)
    if spec.adapter.used:
        inject(hf, family, spec.adapter)
    if kernels.fused:
        use_fused_blocks(hf, family)
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(compute_dtype(spec.parallel))
    if spec.adapter.used and spec.adapter.quantizes:
        quantize_base(hf, family, spec.adapter)
    recompute_activations(hf, spec.recompute)
    return PackedVLM(hf, family, _MEAN_AND_STD, _MEAN_AND_STD, group)


def cut(model: PackedVLM) -> dict[tuple[str, int], int]:
    """Leave three blocks of each row of blocks of one kind, in place.

    Returns:
        For each block that is left, by tower and number, how many it stands for: only for those in the middle of
        others, which are entered and left as all of them are.
    """
    visual, text = model.hf.model.visual, model.hf.model.language_model
    levels = tuple(getattr(visual, "deepstack_visual_indexes", ()))
    whole = tuple(getattr(visual, "fullatt_block_indexes", ()))
    kinds = [(number in levels, number in whole, _kind(block)) for number, block in enumerate(visual.blocks)]
    left, counts = _shortened(kinds)
    visual.blocks = nn.ModuleList(visual.blocks[number] for number in left)
    for name, indexes in (("deepstack_visual_indexes", levels), ("fullatt_block_indexes", whole)):
        if indexes:
            setattr(visual, name, [place for place, number in enumerate(left) if number in indexes])
    stands_for = {("vit", place): count for place, count in enumerate(counts)}
    if model.family.hearing:
        tower = model.hf.model.audio_tower
        left, counts = _shortened([_kind(layer) for layer in tower.layers])
        tower.layers = nn.ModuleList(tower.layers[number] for number in left)
        stands_for |= {("audio", place): count for place, count in enumerate(counts)}
    kinds = [(number < len(levels), _kind(layer)) for number, layer in enumerate(text.layers)]
    left, counts = _shortened(kinds)
    text.layers = nn.ModuleList(text.layers[number] for number in left)
    return stands_for | {("llm", place): count for place, count in enumerate(counts)}


def _kind(block: nn.Module) -> Hashable:
    parameters = tuple((name, p.requires_grad, tuple(p.shape)) for name, p in block.named_parameters())
    return parameters, block.gradient_checkpointing


def _shortened(kinds: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """Return the numbers of the blocks that are left, and how many each stands for."""
    left: list[int] = []
    counts: list[int] = []
    for _, row in groupby(enumerate(kinds), key=lambda item: item[1]):
        numbers = [number for number, _ in row]
        middle = numbers[1:-1]
        left += [numbers[0], *middle[:1], *numbers[1:][-1:]]
        counts += [1, *([len(middle)] if middle else []), *([1] if len(numbers) > 1 else [])]
    return left, counts


def number_of(model: nn.Module, *, trained: bool | None = None) -> int:
    """Count the parameters of a model: all, the trained or the frozen ones; of bytes, the numbers they stand for."""
    floats = [p for p in model.parameters() if p.is_floating_point()]
    quantized = 0 if trained else sum(layer.quantized.shape.numel() for _, layer in quantized_layers(model))
    return quantized + sum(p.numel() for p in floats if trained is None or p.requires_grad is trained)

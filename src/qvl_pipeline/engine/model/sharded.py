"""A model sharded over all ranks: which of its layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qvl_pipeline.engine.feed.batch import Batch
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.parallel.sharding import shard
from qvl_pipeline.engine.spec import ParallelSpec
from qvl_pipeline.families import ModelFamily


def shard_model(model: PackedVLM, device: torch.device, spec: ParallelSpec) -> dict[str, Any]:
    """Shard a model in place over all ranks.

    Args:
        model: The model; on the meta device, if it should never be complete on any rank.
        device: Where it runs.
        spec: What to wrap, over how many ranks, and in which precision to compute.

    Returns:
        Facts for `result.json`.

    Raises:
        ValueError: A class name is not that of any module, the ranks cannot be divided as asked, or nothing is frozen
            that could be replicated.
    """
    layers = layers_to_wrap(model, model.family, spec.transformer_layer_cls_to_wrap)
    replicated = frozen_parameters(model) if spec.frozen_sharding == "replicated" else []
    towers: dict[nn.Module, Callable[[Batch], bool]] = {model.hf.model.visual: lambda batch: batch.patches is None}
    if model.family.hearing:
        towers[model.hf.model.audio_tower] = lambda batch: not batch.sound_inputs
    return shard(model, towers, layers, replicated, device, spec)


def frozen_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what `frozen_sharding: replicated` leaves whole on every rank.

    Raises:
        ValueError: Nothing is frozen.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if not frozen:
        raise ValueError(
            "fsdp_config.frozen_sharding 'replicated' is for frozen weights, and this run trains all of them: take it "
            "out, or freeze something (adapter.type, train.freeze_modules)"
        )
    return frozen


def layers_to_wrap(model: nn.Module, family: ModelFamily, wrap: Sequence[str]) -> list[str]:
    """Name the classes of the layers that are sharded one by one.

    Experts always are: most of a layer, of which attention has no need. So are blocks of the towers: as a part of the
    root they would stay gathered from the forward to the end of the backward pass.

    Args:
        model: The model; a skeleton on the meta device will do.
        family: Its family.
        wrap: Class names asked for; none at all takes the family's decoder layer.

    Raises:
        ValueError: A name is not the class of any module.
    """
    experts = (family.experts,) if family.experts else ()
    towers = (family.vision_block, *((family.hearing.encoder_layer,) if family.hearing else ()))
    names = list(dict.fromkeys([*(wrap or (family.decoder_layer,)), *towers, *experts]))
    present = {type(module).__name__ for module in model.modules()}
    for name in names:
        if name not in present:
            raise ValueError(
                f"transformer_layer_cls_to_wrap: no module of {family.name} has the class '{name}'; "
                f"its layers are {' and '.join([family.decoder_layer, *towers])}"
            )
    return names

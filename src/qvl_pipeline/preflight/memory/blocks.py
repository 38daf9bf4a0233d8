"""The blocks of a model, by tower, in the order in which a forward pass runs them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qvl_pipeline.engine.model.packed_vlm import PackedVLM


def towers_of(model: PackedVLM) -> dict[str, nn.Module]:
    """Return the towers that make features for the language model: `vit`, and `audio` where the model hears."""
    towers = {"vit": model.hf.model.visual}
    return towers | ({"audio": model.hf.model.audio_tower} if model.family.hearing else {})


def blocks_of(model: PackedVLM) -> Iterator[tuple[str, int, nn.Module]]:
    """Yield the tower (`llm` is the language model), the number and the module of each block."""
    inside = model.hf.model
    stacks = {"vit": inside.visual.blocks}
    if model.family.hearing:
        stacks["audio"] = inside.audio_tower.layers
    stacks["llm"] = inside.language_model.layers
    for tower, blocks in stacks.items():
        for number, block in enumerate(blocks):
            yield tower, number, block

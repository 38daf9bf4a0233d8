"""What FSDP2 shards as one: the parameters of a block, of the rest of the tower, and of all else; and their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from qvl_pipeline.engine.model.packed_vlm import PackedVLM

FLOAT32 = 4


@dataclass(frozen=True)
class Unit:
    """Numbers of a unit, over `shards` ranks; a parameter's first dimension is padded to a multiple of them.

    Attributes:
        trained: Numbers of the trained parameters on one rank.
        frozen: Bytes of the frozen ones on one rank.
        matrices: Those of `trained` that are in matrices.
        shards: Ranks that they are sharded over.
        width: Bytes of a number in the type of the computation.
        largest: Numbers of the largest parameter.
    """

    trained: int
    frozen: int
    matrices: int
    shards: int
    width: int
    largest: int

    @property
    def gathered(self) -> int:
        """Bytes of all its parameters, in the type of the computation."""
        return self.shards * self.sliced

    @property
    def sliced(self) -> int:
        """Bytes of this rank's part of them, in that type."""
        return self.width * self.trained + self.frozen

    @property
    def summed(self) -> int:
        """Bytes of the gradients that are exchanged, float32."""
        return FLOAT32 * self.shards * self.trained

    @property
    def weights(self) -> int:
        """Bytes of its weights on one rank, between steps."""
        return FLOAT32 * self.trained + self.frozen

    @property
    def gradients(self) -> int:
        """Bytes of its gradients on one rank, between micro-batches."""
        return FLOAT32 * self.trained


def units_of(model: PackedVLM, shards: int, dtype: torch.dtype) -> dict[tuple[str, int], Unit]:
    """Return the units by tower and number of block; `("vit", -1)` is the rest of the tower, `("", -1)` all else.

    Args:
        model: The model on the meta device, frozen and adapted as in the run.
        shards: Ranks that share one copy of it.
        dtype: Type of the computation.
    """
    visual, text = model.hf.model.visual, model.hf.model.language_model
    blocks = {("vit", number): list(block.parameters()) for number, block in enumerate(visual.blocks)}
    blocks |= {("llm", number): list(layer.parameters()) for number, layer in enumerate(text.layers)}
    in_blocks = {parameter for parameters in blocks.values() for parameter in parameters}
    tower = [parameter for parameter in visual.parameters() if parameter not in in_blocks]
    rest = [parameter for parameter in model.parameters() if parameter not in in_blocks.union(tower)]
    parts = {**blocks, ("vit", -1): tower, ("", -1): rest}
    width = torch.empty(0, dtype=dtype).element_size()
    return {place: _unit(parameters, shards, width) for place, parameters in parts.items()}


def _unit(parameters: Iterable[nn.Parameter], shards: int, width: int) -> Unit:
    trained = frozen = matrices = largest = 0
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.ndim else 1
        own = -(-rows // shards) * (parameter.numel() // rows)
        if parameter.requires_grad:
            trained += own
            matrices += own if parameter.ndim >= 2 else 0
        else:
            frozen += own * parameter.element_size()
        largest = max(largest, parameter.numel())
    return Unit(trained, frozen, matrices, shards, width, largest)

"""What FSDP2 shards as one: the parameters of a block, of the rest of the tower, and of all else; and their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.parallel.sharding import compute_dtype
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.preflight.memory.blocks import blocks_of, towers_of

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Unit:
    """Numbers of a unit, over `shards` ranks; a parameter's first dimension is padded to a multiple of them.

    Attributes:
        trained: Numbers of the trained parameters on one rank.
        frozen: Bytes of the frozen ones on one rank, as far as they are sharded.
        replicated: Bytes of those that every rank has whole.
        matrices: Those of `trained` that are in matrices.
        shards: Ranks that they are sharded over.
        width: Bytes of a number in the type of the computation.
        held: Bytes of a trained number between steps, and of its gradient.
        largest: Numbers of the largest parameter.
    """

    trained: int
    frozen: int
    replicated: int
    matrices: int
    shards: int
    width: int
    held: int
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
        return self.held * self.trained + self.frozen + self.replicated

    @property
    def gradients(self) -> int:
        """Bytes of its gradients on one rank, between micro-batches."""
        return self.held * self.trained


def units_of(model: PackedVLM, shards: int, spec: TrainSpec) -> dict[tuple[str, int], Unit]:
    """Return the units by tower and number of block; `(tower, -1)` is the rest of a tower, `("", -1)` all else.

    Args:
        model: The model on the meta device, frozen and adapted as in the run, in the type of the computation.
        shards: Ranks that share one copy of it.
        spec: The run.
    """
    parts = {(tower, number): list(block.parameters()) for tower, number, block in blocks_of(model)}
    taken = {parameter for parameters in parts.values() for parameter in parameters}
    for tower, module in [*towers_of(model).items(), ("", model)]:
        parts[tower, -1] = [parameter for parameter in module.parameters() if parameter not in taken]
        taken.update(parts[tower, -1])
    return {place: _unit(parameters, shards, spec) for place, parameters in parts.items()}


def _unit(parameters: Iterable[nn.Parameter], shards: int, spec: TrainSpec) -> Unit:
    trained = frozen = replicated = matrices = largest = 0
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.ndim else 1
        own = -(-rows // shards) * (parameter.numel() // rows)
        if parameter.requires_grad:
            trained += own
            matrices += own if parameter.ndim >= 2 else 0
        elif spec.parallel.frozen_sharding == "replicated":
            replicated += parameter.nbytes
            continue
        else:
            frozen += own * parameter.element_size()
        largest = max(largest, parameter.numel())
    width = torch.empty(0, dtype=compute_dtype(spec.parallel)).element_size()
    held = BFLOAT16 if spec.optim.in_bfloat16 else FLOAT32
    return Unit(trained, frozen, replicated, matrices, shards, width, held, largest)

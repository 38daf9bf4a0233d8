"""Muon over sharded matrices."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

# The step of torch's Muon, taken apart: momentum is elementwise, orthogonalisation needs the matrix whole.
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` for parameters that FSDP2 has sharded over their rows.

    Muon orthogonalises the momentum of a whole matrix, which no rank has. As many matrices as there are ranks are
    therefore transposed at once: one all-to-all gives each rank one of them whole, each orthogonalises its own, and a
    second all-to-all gives the rows back. Per matrix that moves what one gather would, no work is done twice, and no
    rank ever holds more than one matrix. The result is that of one process, bit for bit: torch's own class, given
    DTensors, would redistribute in every one of its fifteen matrix products.

    State and parameters stay sharded, so a checkpoint of it loads on any number of ranks.

    torch's iteration computes in bfloat16. Gradients that differ in their last bits, as those of other numbers of ranks
    do, are then rounded to neighbours now and then, and what is made orthogonal differs by 1/256: the matrices of
    adapters differ by 1 % after three steps. As they are small, theirs can be in float32, where that is 1e-6.
    """

    def __init__(self, params: Any, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        """Take the options of torch's Muon, and the type in which matrices are exchanged and made orthogonal."""
        super().__init__(params, **options)
        self._dtype = dtype
        self._zeropower = _zeropower_via_newtonschulz if dtype is torch.bfloat16 else _zeropower

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one optimizer step; called by all ranks of the shards."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            # Neighbours of one size leave no rank waiting for another's larger matrix.
            parameters = sorted((p for p in group["params"] if p.grad is not None), key=torch.numel)
            for dimension, members in _by_sharding(parameters).items():
                process_group = members[0].device_mesh.get_group(dimension)
                size = process_group.size()
                for start in range(0, len(members), size):
                    self._step_chunk(members[start : start + size], group, process_group)
        return loss

    def _step_chunk(self, parameters: list[DTensor], group: dict[str, Any], process_group: dist.ProcessGroup) -> None:
        """Update as many matrices as there are ranks, or fewer."""
        updates = [self._momentum_update(parameter, group) for parameter in parameters]

        def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
            return self._zeropower(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])

        shapes = [parameter.shape for parameter in parameters]
        for parameter, update in zip(parameters, _on_whole(orthogonalize, updates, shapes, process_group), strict=True):
            local = parameter.to_local()
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape))

    def _momentum_update(self, parameter: DTensor, group: dict[str, Any]) -> torch.Tensor:
        """Add the gradient to the momentum; return this rank's rows of what is to be orthogonalised."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient, momentum = parameter.grad.to_local(), state["momentum_buffer"].to_local()
        momentum.lerp_(gradient, 1 - group["momentum"])
        return (gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum).to(self._dtype)


def _zeropower(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Torch's iteration in the type of the matrix, which torch's own function would cast to bfloat16."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def _by_sharding(parameters: list[DTensor]) -> dict[int, list[DTensor]]:
    """Parameters by the mesh dimension that their rows are sharded over (HSDP's replicas have a second one)."""
    found: dict[int, list[DTensor]] = {}
    for parameter in parameters:
        sharded = [dimension for dimension, placement in enumerate(parameter.placements) if placement.is_shard()]
        if [parameter.placements[dimension] for dimension in sharded] != [Shard(0)]:
            raise ValueError(f"Muon needs matrices that are sharded over their rows, not {parameter.placements}")
        found.setdefault(sharded[0], []).append(parameter)
    return found


def _on_whole(
    function: Callable[[torch.Tensor], torch.Tensor],
    shards: list[torch.Tensor],
    shapes: list[torch.Size],
    process_group: dist.ProcessGroup,
) -> list[torch.Tensor]:
    """Apply a function to whole matrices, matrix `r` on rank `r`.

    Args:
        function: From a matrix to one of its shape and dtype.
        shards: This rank's rows of each matrix; at most as many matrices as there are ranks.
        shapes: Shapes of the whole matrices.
        process_group: The ranks that hold the rows.

    Returns:
        This rank's rows of the results.
    """
    rank, size = process_group.rank(), process_group.size()
    sizes = [shard.numel() for shard in shards] + [0] * (size - len(shards))
    mine = _rows_of_ranks(shapes[rank], size) if rank < len(shapes) else [0] * size
    received = _all_to_all(torch.cat([shard.flatten() for shard in shards]), sizes, mine, process_group)
    if rank < len(shapes):
        received = function(received.view(shapes[rank])).flatten()
    returned = _all_to_all(received, mine, sizes, process_group)
    return [part.view_as(shard) for part, shard in zip(returned.split(sizes), shards, strict=False)]


def _rows_of_ranks(shape: torch.Size, ranks: int) -> list[int]:
    """Elements of a matrix on each rank: FSDP2 shards as `torch.chunk` does, so the last ranks may have none."""
    per_rank = -(-shape[0] // ranks)
    rows = [min(per_rank, max(0, shape[0] - rank * per_rank)) for rank in range(ranks)]
    return [count * prod(shape[1:]) for count in rows]


def _all_to_all(
    sent: torch.Tensor, send_sizes: list[int], receive_sizes: list[int], process_group: dist.ProcessGroup
) -> torch.Tensor:
    received = sent.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, sent.contiguous(), receive_sizes, send_sizes, group=process_group)
    return received

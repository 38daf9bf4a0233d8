"""A trained low-rank update of each expert, beside the fused tensors of a layer's experts, which are frozen.

peft adds the updates to the tensors before it multiplies, which makes of each layer a second copy of all its experts.
Here tokens that are sorted by expert go through the factors as they go through the tensors, in products of groups.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl_pipeline.engine.model.adapters.form import Form

# Fused tensors of experts, in the order in which a layer has them.
FUSED = ("gate_up_proj", "down_proj")
_UPDATE = "_update"
# Bytes of which the rows of a product in groups are a multiple; of bfloat16 that is this many numbers.
_ALIGNED = 8


class ExpertsUpdate(nn.Module):
    """The update `s B_e A_e` of a tensor `[experts, out, in]`: `lora_A [experts, r, in]`, `lora_B [experts, out, r]`.

    Attributes:
        form: Rank and scaling. There is no dropout, no length of rows (DoRA) and no principal part (PiSSA).
        enabled: Compute the update; otherwise experts are the base model's.
    """

    def __init__(self, tensor: Tensor, form: Form) -> None:
        """Make room for the update of a tensor, in float32, on its device; the values are still to be set."""
        super().__init__()
        self.form, self.enabled = form, True
        experts, rows, columns = tensor.shape
        for side, shape in {"A": (experts, form.r, columns), "B": (experts, rows, form.r)}.items():
            values = torch.empty(shape, dtype=torch.float32, device=tensor.device)
            setattr(self, f"lora_{side}", nn.Parameter(values))


def fused_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors of a model that hold all experts of a layer, by name, in its order."""
    return {name: p for name, p in model.named_parameters() if p.ndim == 3 and name.endswith(FUSED)}


def target_of(module: str) -> str:
    """Name of the tensor that the update with this name as a module is of."""
    return module.removesuffix(_UPDATE)


def adapt_experts(model: nn.Module, tensor: str, form: Form) -> None:
    """Put an update beside a fused tensor; the module of the experts, its class and its tensors stay as they are.

    Args:
        model: The transformers model.
        tensor: Name of the tensor.
        form: Rank and scaling.
    """
    owner, _, own = tensor.rpartition(".")
    experts = model.get_submodule(owner)
    experts.register_module(own + _UPDATE, ExpertsUpdate(getattr(experts, own), form))
    experts.forward = MethodType(_forward, experts)


def _forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts as transformers' `grouped_mm` does, and step by step the same numbers, with updates.

    Args:
        experts: Their module.
        hidden_states: Tokens `[T, H]`.
        top_k_index: Which experts a token goes to `[T, k]`.
        top_k_weights: How much each of them counts `[T, k]`.

    Returns:
        `[T, H]`.
    """
    chosen, order = top_k_index.flatten().sort()
    numbers = torch.arange(experts.num_experts, device=chosen.device)
    ends = torch.searchsorted(chosen, numbers, right=True).int()
    rows = hidden_states[order // top_k_index.shape[1]]
    inside = experts._apply_gate(_product(experts, "gate_up_proj", rows, ends))
    outside = _product(experts, "down_proj", inside, ends) * top_k_weights.flatten()[order][:, None]
    return outside[order.argsort()].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


def _product(experts: nn.Module, own: str, rows: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows, sorted by expert, by a tensor of the experts and its update.

    Args:
        experts: Their module.
        own: Name of the tensor.
        rows: `[S, in]`.
        ends: Where the rows of each expert end `[experts]`, int32.

    Returns:
        `[S, out]`.
    """
    in_groups = experts.config._experts_implementation != "eager"
    linear = _in_groups if in_groups else _one_by_one
    plain = linear(rows, getattr(experts, own), ends)
    update = getattr(experts, own + _UPDATE, None)
    if update is None or not update.enabled:
        return plain
    a, b = update.lora_A.to(plain.dtype), update.lora_B.to(plain.dtype)
    if in_groups and (short := -update.form.r % _ALIGNED):  # rows of zeros, of which nothing comes
        a, b = F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))
    return plain + linear(linear(rows, a, ends), b, ends) * update.form.scaling


def _in_groups(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows.to(matrices.dtype), matrices.transpose(-2, -1), offs=ends)


def _one_by_one(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(own, matrix) for own, matrix in zip(rows.split(lengths), matrices, strict=True)])

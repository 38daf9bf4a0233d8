"""One matrix instead of a matrix and its adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qvl_pipeline.engine.model.adapters.form import Form
from qvl_pipeline.engine.model.adapters.linear import row_lengths_of


def merged(weight: torch.Tensor, adapter: Mapping[str, torch.Tensor], form: Form) -> torch.Tensor:
    """Merge an adapter into the matrix that it adapts, in float32.

    Args:
        weight: The base model's matrix `[out, in]`, or its experts `[experts, out, in]`, as the module has them.
        adapter: `lora_A` and `lora_B`; `lora_A0` and `lora_B0`, `lora_magnitude` where the form has them.
        form: Rank, scaling and kind of the adapter.

    Returns:
        The same, float32: bit for bit `weight` where the adapter is as it began.
    """
    whole = weight.float() + update_of(adapter, form)
    if not form.dora:
        return whole
    lengths = row_lengths_of(weight.float()) + adapter["lora_magnitude"].float()
    return whole * (lengths / row_lengths_of(whole))[:, None]


def update_of(adapter: Mapping[str, torch.Tensor], form: Form) -> torch.Tensor:
    """What an adapter adds to its matrix, or to each expert: float32."""
    update = adapter["lora_B"].float() @ adapter["lora_A"].float()
    if form.pissa:
        update = update - adapter["lora_B0"].float() @ adapter["lora_A0"].float()
    return update * form.scaling

"""A trained low-rank update beside a frozen linear layer: LoRA and DoRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qvl_pipeline.engine.model.adapters.form import Form
from qvl_pipeline.engine.model.adapters.frozen import FrozenLinear


class AdaptedLinear(FrozenLinear):
    """`y = W x + b + s B A x` with a frozen `W [out, in]` and trained `A [r, in]`, `B [out, r]`.

    DoRA (Liu et al. 2024) gives each row of `W + s B A` a trained length. peft trains that length itself. Here it is
    the row's own length in `W`, taken in float32 at each forward, plus a trained `lora_magnitude [out]` that starts at
    zero: a length rounded to bfloat16 would differ from the base model's at the first step, and could not follow
    updates of less than 1/256 of it. As in the paper (section 4.3), no gradient goes through the norm.

    PiSSA (Meng et al. 2024) starts at `B0 A0`, the principal part of `W`, and trains against the rest `W - s B0 A0`.
    Here `W` stays as it is and `s B0 A0 x` is subtracted: the same function, with a base that is bit-unchanged and a
    first step that is the base model's.

    Attributes:
        enabled: Compute the update; otherwise the layer is the base model's.
    """

    def __init__(self, base: nn.Linear, form: Form) -> None:
        """Take over the parameters of a layer; those of the update are float32, on the same device, without values."""
        super().__init__(base)
        self.form, self.enabled = form, True

        def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
            values = torch.empty(shape, dtype=torch.float32, device=base.weight.device)
            return nn.Parameter(values, requires_grad=trained)

        shapes = {"A": (form.r, self.in_features), "B": (self.out_features, form.r)}
        for side, shape in shapes.items():
            setattr(self, f"lora_{side}", parameter(*shape))
        for side, shape in shapes.items():
            setattr(self, f"lora_{side}0", parameter(*shape, trained=False) if form.pissa else None)
        self.lora_magnitude = parameter(self.out_features) if form.dora else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `[…, in]` to `[…, out]`."""
        plain = self.product(x, self.bias)
        if not self.enabled:
            return plain
        drops = self.training and self.form.dropout > 0
        dropped = F.dropout(x, self.form.dropout) if drops else x
        update = _low_rank(dropped, self.lora_A, self.lora_B, self.form.scaling)
        if self.lora_A0 is not None:
            update = update - _low_rank(dropped, self.lora_A0, self.lora_B0, self.form.scaling)
        if self.lora_magnitude is None:
            return plain + update
        turned = self.product(dropped) if drops else plain if self.bias is None else plain - self.bias
        stretch = self._stretch(x.dtype)
        return plain + (stretch - 1).to(x.dtype) * turned + stretch.to(x.dtype) * update

    def _stretch(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the trained length of each row over the one that it would have: `[out]`, float32."""
        own, whole = row_lengths(self.matrix(dtype), self.lora_A, self.lora_B, self.form.scaling)
        return (own + self.lora_magnitude.float()) / whole


def _low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling


@torch.no_grad()
def row_lengths(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lengths of the rows of `W` and of `W + s B A`: `[out]` each, float32, equal bit for bit where B is 0.

    The sum is never made: |w + s b A|² = |w|² + 2 s b·(A w) + s² b·(A Aᵀ b) for each row.
    """
    a, b = a.float(), b.float()
    square = row_lengths_of(weight).square()
    cross = (F.linear(weight, a.to(weight.dtype)).float() * b).sum(1)
    update = ((b @ (a @ a.T)) * b).sum(1)
    return square.sqrt(), (square + 2 * scaling * cross + scaling**2 * update).clamp_min(0).sqrt()


def row_lengths_of(weight: torch.Tensor) -> torch.Tensor:
    """Lengths of the rows of a matrix, `[out]`, float32: from which peft's lengths and ours are told apart."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)

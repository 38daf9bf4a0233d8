"""The loss scale of float16 training (Micikevicius et al., Mixed Precision Training, 2018, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_INITIAL = 2.0**16
_GROWTH_INTERVAL = 2000


class LossScale:
    """A factor on the loss by which small gradients survive float16; the largest that lets none overflow.

    It is halved with every step whose gradients overflow, which is then not taken, and doubled after 2,000 steps
    without one: the rules and numbers of `torch.amp.GradScaler`. That class looks for infinities in the gradients of
    each rank alone; here it is the norm over all ranks, which clipping needs anyway: all skip the same steps.
    """

    def __init__(self) -> None:
        """Start at 65,536."""
        self.value = _INITIAL
        self.skipped_steps = 0
        self._steps_since_change = 0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients, in place, by the factor that their loss had."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], 1.0 / self.value)

    def accepts(self, grad_norm: torch.Tensor) -> bool:
        """Say whether a step with this gradient norm is to be taken, and set the factor of the next one.

        Waits for the device: whether a step is taken cannot be decided later.

        Args:
            grad_norm: Norm over all ranks.

        Returns:
            False for an overflow that a smaller factor may avoid. At a factor of 1 there is none: the gradient itself
            is not finite, and whoever watches for that must see it.
        """
        if not torch.isfinite(grad_norm) and self.value > 1:
            self.value /= 2
            self.skipped_steps += 1
            self._steps_since_change = 0
            return False
        self._steps_since_change += 1
        if self._steps_since_change == _GROWTH_INTERVAL:
            self.value *= 2
            self._steps_since_change = 0
        return True

    def row(self) -> dict[str, Any]:
        """Figures for `metrics.jsonl`."""
        return {"loss_scale": self.value, "skipped_steps": self.skipped_steps}

    def state_dict(self) -> dict[str, float | int]:
        """Return what a resumed run goes on with."""
        names = ("value", "skipped_steps", "_steps_since_change")
        return {name.removeprefix("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on where a checkpoint was."""
        self.value = state["value"]
        self.skipped_steps = state["skipped_steps"]
        self._steps_since_change = state["steps_since_change"]

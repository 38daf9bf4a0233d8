"""An exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import nn


class WeightAverage:
    """The average of the trained weights, in float32 and sharded like them.

    After each step, `average = decay * average + (1 - decay) * weights`, from the base model's weights on. In bfloat16
    the small difference would be rounded away and the average would stand still.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the weights as they are."""
        self._decay = decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.state = {name: weight.detach().float().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        weights = [_local(weight).float() for weight in self._weights.values()]
        torch._foreach_lerp_([_local(average) for average in self.state.values()], weights, 1 - self._decay)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Overwrite the model's weights by their average."""
        for name, weight in self._weights.items():
            weight.copy_(self.state[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

"""The vision tower's patch embedding as the matrix product that it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Module):
    """A `Conv3d` whose stride is its kernel, computed as a linear layer; parameters keep their names and shapes.

    The tower hands over patches that are already cut out, so each convolution has exactly one output position. cuDNN
    and oneDNN handle that shape badly: several times slower on a CPU, and the cause of Qwen3-VL training "130 h instead
    of 3 h" on GPUs (EvolvingLMMs-Lab/lmms-engine#99).
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        """Take over the parameters of a convolution.

        Raises:
            ValueError: Its patches would overlap, or have gaps.
        """
        super().__init__()
        if convolution.stride != convolution.kernel_size or any(convolution.padding):
            raise ValueError(f"the patch embedding is not a plain projection of patches: {convolution}")
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Project patches `[N, C, T, P, P]` to `[N, H, 1, 1, 1]`, as the convolution does."""
        projected = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return projected[:, :, None, None, None]


def use_linear_patch_embedding(model: nn.Module) -> None:
    """Let a Qwen-VL model project its patches by a linear layer."""
    embedding = model.model.visual.patch_embed
    embedding.proj = PatchProjection(embedding.proj)

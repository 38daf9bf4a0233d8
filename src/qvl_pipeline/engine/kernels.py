"""Liger's fused kernels, where they run."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from qvl_pipeline.engine.families import ModelFamily


def use_liger_kernels(model: nn.Module, family: ModelFamily, device: torch.device) -> str:
    """Replace RMSNorm and SwiGLU by Liger's kernels on CUDA; the loss and attention are our own.

    Returns:
        What was replaced, or why nothing was.

    Raises:
        ValueError: Liger is not installed.
    """
    if device.type != "cuda":
        return f"not used: Liger's kernels need CUDA, and this is {device.type}"
    try:
        import liger_kernel.transformers as liger
    except ImportError as error:
        raise ValueError("use_liger_kernel needs the package liger-kernel: install it, or set it to false") from error
    before = {name: module.forward.__func__ for name, module in model.named_modules()}
    apply = getattr(liger, f"apply_liger_kernel_to_{family.name}")
    apply(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=model)
    replaced = Counter(
        type(module).__name__ for name, module in model.named_modules() if module.forward.__func__ is not before[name]
    )
    return ", ".join(f"{count} {name}" for name, count in sorted(replaced.items())) or "nothing was replaced"

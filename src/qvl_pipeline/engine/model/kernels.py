"""Fused blocks: Liger's kernels or compiled ones, and which of them where parameters leave it to the engine."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from types import MethodType

import torch
from torch import nn

from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES, ModelFamily


def why_not_liger(device: torch.device) -> str | None:
    """Say why Liger's kernels cannot be used on a device; `None` when they can."""
    return None if device.type == "cuda" else f"not used: Liger's kernels need CUDA, and this is {device.type}"


def fused_blocks(
    spec: TrainSpec, device: torch.device, *, liger_is_there: bool = find_spec("liger_kernel") is not None
) -> tuple[bool, bool]:
    """Choose how blocks are computed: what parameters say, and for `auto` the fastest that was measured.

    Only one of both is chosen by itself: compiled blocks were the fastest with Liger's norms off. With recomputation,
    over a quantised base, and where inputs are offloaded, compiling was not measured or does not work.

    Args:
        spec: The run.
        device: Where it computes.
        liger_is_there: Whether `auto` may take Liger's kernels: whether they are installed there.

    Returns:
        Whether Liger's kernels are used, and whether blocks are compiled.
    """
    liger, compiled = spec.model.use_liger_kernel, spec.model.torch_compile
    family, on_gpu = FAMILIES[spec.model.family], device.type == "cuda"
    if compiled == "auto":
        plain = spec.recompute.llm == spec.recompute.vit == "none" and not spec.adapter.quantizes
        may = plain and liger is not True and "compile" not in family.unsupported
        compiled = on_gpu and may and family.fastest_blocks == "compiled"
    if liger == "auto":
        liger = on_gpu and not compiled and "liger" not in family.unsupported and liger_is_there
    return bool(liger), bool(compiled)


def use_liger_kernels(model: nn.Module, family: ModelFamily, device: torch.device) -> str | dict[str, int]:
    """Let the norms and gated MLPs of a model compute with Liger's kernels on CUDA; the loss and attention are our own.

    The modules are those that the family names, one by one. `apply_liger_kernel_to_qwen…` of liger-kernel 0.8.5 would
    leave out the MLPs of Qwen3-VL (its `swiglu` has no effect there), and exchange classes inside of transformers
    for the rest of the process.

    Args:
        model: The transformers model; parameters and their names stay as they are.
        family: Its family.
        device: Where it will run.

    Returns:
        Number of modules that compute with Liger, by class; or why there are none.

    Raises:
        ValueError: Liger is not installed, or a class that the family names is not in the model.
    """
    if why_not := why_not_liger(device):
        return why_not
    try:
        from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    except ImportError as error:
        raise ValueError("use_liger_kernel needs the package liger-kernel: install it, or set it to false") from error
    norm = LigerRMSNorm.forward
    forwards = {"rms_norm": norm, "rms_norm_zero_centred": norm, "swiglu": LigerSwiGLUMLP.forward}
    replaced: Counter[str] = Counter()
    for module in model.modules():
        name = type(module).__name__
        kernel = family.liger_kernels.get(name)
        if kernel is None:
            continue
        if kernel == "rms_norm":
            # What that forward reads beside weight and variance_epsilon, with the values that Liger has for Qwen.
            module.offset, module.casting_mode, module.in_place, module.row_mode = 0.0, "llama", True, None
        if kernel == "rms_norm_zero_centred":
            # Scaled by 1 + weight, all of it in float32, as Liger has it for Qwen3-Next.
            module.offset, module.casting_mode, module.in_place, module.row_mode = 1.0, "gemma", False, None
            module.variance_epsilon = module.eps
        module.forward = MethodType(forwards[kernel], module)
        replaced[name] += 1
    if missing := sorted(set(family.liger_kernels) - set(replaced)):
        raise ValueError(
            f"use_liger_kernel: this version of transformers has no {', '.join(missing)} in {family.name}: "
            "set it to false, or install a version that is supported"
        )
    return dict(sorted(replaced.items()))

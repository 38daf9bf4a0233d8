"""Matrices of four bits a number: NF4 blocks with their scales, and the scales in eight bits (QLoRA).

Dettmers et al. 2023, sections 2 and 3. A matrix is cut into blocks of 64 numbers, row after row. Of each block the
largest magnitude is kept, and of each number which of 16 values, quantiles of a normal distribution, is nearest to it.
Double quantisation keeps the magnitudes in eight bits: how far each is from the mean of all, as E4M3 floats scaled by
the largest of 256.

All of it is bytes, rows of blocks first: FSDP2 shards rows, gathers them bit for bit and casts none. What is stored
depends on the matrix alone, on no number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F

BLOCK, GROUP = 64, 256
# Appendix E of the paper.
VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_E4M3_MAX = 448.0
_TINY = torch.finfo(torch.float32).tiny


def stored_shapes(numbers: int, *, double: bool) -> dict[str, tuple[int, int]]:
    """Shapes of the bytes of a matrix, by what they hold.

    Args:
        numbers: Elements of the matrix.
        double: Quantise the scales of blocks too.
    """
    blocks = -(-numbers // BLOCK)
    if not double:
        return {"codes": (blocks, BLOCK // 2), "scales": (blocks, 4)}
    groups = -(-blocks // GROUP)
    return {"codes": (blocks, BLOCK // 2), "scales": (blocks, 1), "group_scales": (groups, 4), "mean": (1, 4)}


def quantize(matrix: torch.Tensor, *, double: bool) -> dict[str, torch.Tensor]:
    """Quantise a matrix.

    Args:
        matrix: Of any shape and floating type.
        double: Quantise the scales of blocks too.

    Returns:
        Its bytes, of the shapes of `stored_shapes`, where the matrix is: `codes`, two of them a byte, the first in the
        upper half; `scales` of blocks, float32 or E4M3; of the latter `group_scales` and the `mean`, both float32.
    """
    blocks = F.pad(matrix.detach().float().flatten(), (0, -matrix.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(VALUES, dtype=torch.float64, device=matrix.device)
    codes = torch.bucketize(blocks / scales.clamp_min(_TINY), ((values[1:] + values[:-1]) / 2).float(), out_int32=True)
    codes = codes.to(torch.uint8)
    stored = {"codes": codes[:, ::2] << 4 | codes[:, 1::2]}
    if not double:
        return stored | {"scales": scales.view(torch.uint8)}
    mean = scales.double().mean().float()  # in any order of summation
    groups = F.pad((scales - mean).flatten(), (0, -len(scales) % GROUP)).view(-1, GROUP)
    group_scales = (groups.abs().amax(1, keepdim=True) / _E4M3_MAX).clamp_min(_TINY)
    e4m3 = (groups / group_scales).to(torch.float8_e4m3fn).view(torch.uint8)
    return stored | {
        "scales": e4m3.view(-1, 1)[: len(scales)].contiguous(),
        "group_scales": group_scales.view(torch.uint8),
        "mean": mean.view(1, 1).view(torch.uint8),
    }


def dequantize(stored: Mapping[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Make the matrix that bytes of `quantize` stand for: computed in float32, and rounded once.

    Args:
        stored: The bytes.
        shape: Shape of the matrix.
        dtype: Its type.
    """
    codes, scales = stored["codes"], stored["scales"]
    if "mean" in stored:
        of_groups = stored["group_scales"].view(torch.float32).expand(-1, GROUP).reshape(-1, 1)[: len(scales)]
        scales = F.embedding(scales.int(), _numbers_of_bytes(codes.device)).view(-1, 1) * of_groups
        scales = scales + stored["mean"].view(torch.float32)
    else:
        scales = scales.view(torch.float32)
    blocks = F.embedding(codes.int(), _values_of_bytes(codes.device)).view(-1, BLOCK).mul_(scales)
    return blocks.flatten()[: shape.numel()].view(shape).to(dtype)


@functools.cache
def _values_of_bytes(device: torch.device) -> torch.Tensor:
    """Look-up table of the two values that a byte of codes stands for: `[256, 2]`, float32."""
    values, byte = torch.tensor(VALUES, device=device), torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1)


@functools.cache
def _numbers_of_bytes(device: torch.device) -> torch.Tensor:
    """Look-up table of E4M3 floats: `[256, 1]`, float32; GPUs before Ada have no instruction for it."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()[:, None]

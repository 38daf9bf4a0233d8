"""NF4 by itself: held to the paper, written out number by number; and a layer of it to a plain one."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from qvl_pipeline.engine.model.adapters.form import Form
from qvl_pipeline.engine.model.adapters.frozen import FrozenLinear
from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear
from qvl_pipeline.engine.model.adapters.nf4 import VALUES, dequantize, quantize, stored_shapes
from qvl_pipeline.engine.model.adapters.values import fill_quantized, whole_matrix

# Dettmers et al. 2023, appendix E.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
# Not a whole number of blocks, nor of groups of blocks; more than one group.
SHAPES = [(24, 40), (1, 7), (129, 130), (96, 256)]


def single(number: float) -> float:
    """Round to float32."""
    return torch.tensor(number, dtype=torch.float32).item()


def nearest(number: float, values: list[float]) -> int:
    return min(range(len(values)), key=lambda n: abs(number - values[n]))


def eight_bit_floats() -> list[float]:
    """All finite E4M3 numbers: a sign, four bits of exponent with bias 7, three of mantissa, and no infinities."""
    positive = [m / 8 * 2**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return [*positive, *(-number for number in positive)]


def scales_of(absmax: list[float], *, double: bool) -> list[float]:
    """The scales of blocks as they come back from where they are stored."""
    if not double:
        return absmax
    mean, eighths, back = single(math.fsum(absmax) / len(absmax)), eight_bit_floats(), []
    for start in range(0, len(absmax), 256):
        group = [single(scale - mean) for scale in absmax[start : start + 256]]
        step = single(max(map(abs, group)) / max(eighths)) or 1.0
        back += [single(single(eighths[nearest(single(d / step), eighths)] * step) + mean) for d in group]
    return back


def reference(matrix: torch.Tensor, *, double: bool) -> torch.Tensor:
    """A matrix quantised and dequantised, as the paper says: blocks of 64 of all its numbers in a row."""
    numbers = matrix.flatten().tolist()
    blocks = [numbers[start : start + 64] for start in range(0, len(numbers), 64)]
    absmax = [max(map(abs, block)) for block in blocks]
    back = []
    for block, largest, scale in zip(blocks, absmax, scales_of(absmax, double=double), strict=True):
        back += [single(single(NF4[nearest(number / largest, NF4)]) * scale) for number in block]
    return torch.tensor(back).view(matrix.shape)


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    """Seven below zero and eight above, each side evenly spaced in probability and scaled to 1."""
    assert list(VALUES) == NF4
    most, quantile = 0.9677083, NormalDist().inv_cdf  # half way between 1 - 1/30 and 1 - 1/32
    below = [-quantile(most + (0.5 - most) * n / 7) for n in range(7)]
    above = [quantile(most + (0.5 - most) * n / 8) for n in range(8)]
    derived = [number / quantile(most) for number in [*below, 0.0, *reversed(above)]]
    assert derived == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("double", [False, True], ids=["scales", "scales of scales"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_and_back_it_is_what_the_paper_says(shape: tuple[int, int], double: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.rand(shape[0], 1)  # rows of different sizes
    stored = quantize(matrix, double=double)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == stored_shapes(
        matrix.numel(), double=double
    )
    assert all(tensor.dtype == torch.uint8 for tensor in stored.values())
    back = dequantize(stored, matrix.shape, torch.float32)
    assert torch.equal(back, reference(matrix, double=double))
    assert torch.equal(dequantize(stored, matrix.shape, torch.bfloat16), back.bfloat16())
    # Of a normal distribution, four bits keep all but a tenth.
    assert 0.05 < (back - matrix).norm() / matrix.norm() < 0.15


@pytest.mark.parametrize("double", [False, True])
def test_equal_numbers_zeros_and_bfloat16_are_kept(double: bool) -> None:
    for number in (0.0, -0.25, 3.0):
        matrix = torch.full((8, 64), number, dtype=torch.bfloat16)
        assert torch.equal(dequantize(quantize(matrix, double=double), matrix.shape, torch.bfloat16), matrix)
    matrix = torch.zeros(8, 64)
    matrix[3, 5] = 2.0
    assert torch.equal(dequantize(quantize(matrix, double=False), matrix.shape, torch.float32), matrix)


def quantized_layer(layer: FrozenLinear, *, double: bool = True) -> FrozenLinear:
    weight = layer.weight.clone()
    layer.quantize(double=double)
    fill_quantized(layer, weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_the_matrix_that_its_bytes_stand_for(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = quantized_layer(FrozenLinear(nn.Linear(96, 40, bias=bias, dtype=dtype).requires_grad_(False)))
    assert layer.weight is None
    matrix = layer.matrix(dtype)
    assert torch.equal(whole_matrix(layer).to(dtype), matrix)
    x, other = (torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    y, expected = layer(x.requires_grad_()), nn.functional.linear(other.requires_grad_(), matrix, layer.bias)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("form", [Form(4, 2.0), Form(4, 2.0, dora=True)], ids=["lora", "dora"])
def test_no_matrix_is_kept_for_the_backward_pass(form: Form) -> None:
    """Of a whole model they would be the unquantised model."""
    layer = quantized_layer(AdaptedLinear(nn.Linear(256, 512, bias=False).requires_grad_(False), form))
    for parameter in (p for p in layer.parameters() if p.requires_grad):
        nn.init.normal_(parameter)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(torch.randn(2, 256, requires_grad=True))
    y.sum().backward()
    assert sum(kept.values()) < 256 * 512


def test_a_matrix_of_another_shape_is_no_weight_of_the_layer() -> None:
    layer = FrozenLinear(nn.Linear(64, 32))
    layer.quantize(double=True)
    with pytest.raises(ValueError, match=r"a weight of shape \[64, 32\] is stored, but the model has \[32, 64\]"):
        fill_quantized(layer, torch.zeros(64, 32))

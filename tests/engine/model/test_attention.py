"""Attention over packs equals attention over each sequence alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qvl_pipeline.engine.model.attention.kernels import KERNELS, Segments, choose_kernel


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 9, 3, 40, 9, 17], [33, 130, 2]])
def test_packed_equals_separate(kernel: str, causal: bool, lengths: list[int]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q = torch.randn(1, 4, total, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, total, 8, requires_grad=True) for _ in range(2))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)

    packed = KERNELS[kernel](q, k, v, Segments(cu, None), 0.3, causal)
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, s:e], k[:, :, s:e], v[:, :, s:e], is_causal=causal, scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        for s, e in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
    ]
    separate = torch.cat(parts, dim=1)

    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(packed)
    grads = torch.autograd.grad((packed * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((separate * weight).sum(), (q, k, v))
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "torch_varlen"])
def test_kernel_that_cannot_run_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'.*use 'auto'"):
        choose_kernel(name, torch.device("cpu"), half=True)

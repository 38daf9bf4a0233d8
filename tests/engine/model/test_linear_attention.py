"""Linear attention over packs: cut by every kernel, chosen by name, refused where a package is missing."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5

from qvl_pipeline.engine.model.attention import linear
from qvl_pipeline.engine.model.attention.linear import KERNELS, choose_linear_kernel, use_packed_linear_attention
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.parallel.sequence_parallel import check_degree
from qvl_pipeline.families import FAMILIES, divided_heads
from tests.engine.model.test_packed_vlm import hidden_states
from tests.engine.packs import load_packed, make_builder, make_samples

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter only named
FAMILY = FAMILIES["qwen3_5"]


def token_by_token(
    module: nn.Module, qkv: Tensor, filters: Tensor, log_decay: Tensor, strength: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """The definition: a sample after the other, a token after the other, all by products of matrices."""
    outputs = []
    for start, end in pairwise(cu_seqlens.tolist()):
        windows = F.pad(qkv[0, start:end].T, (filters.shape[1] - 1, 0)).unfold(1, filters.shape[1], 1)
        mixed = F.silu(windows @ filters[:, :, None])[..., 0].T[None]
        query, key, value = (part[0].transpose(0, 1) for part in linear._heads(module, mixed))
        query, key = (modeling_qwen3_5.l2norm(part) for part in (query, key))
        query, key = (part.repeat_interleave(len(value) // len(part), dim=0) for part in (query, key))
        decay, beta = (values[0, start:end].T[:, :, None, None] for values in (log_decay.exp(), strength))
        state, tokens = qkv.new_zeros(len(value), key.shape[2], value.shape[2]), []
        for t in range(end - start):
            q, k, v = (part[:, t, None] for part in (query, key, value))
            state = state * decay[:, t]
            state = state + k.transpose(1, 2) @ ((v - k @ state) * beta[:, t])
            tokens.append(q @ state * q.shape[-1] ** -0.5)
        outputs.append(torch.cat(tokens, dim=1))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


@pytest.fixture
def model(tiny_folders: Any) -> PackedVLM:
    return load_packed(tiny_folders("qwen3_5"), "qwen3_5")


def of_a_pack(model: PackedVLM) -> Tensor:
    config = model.hf.config
    samples = [make_samples(config, "qwen3_5")[kind] for kind in ("text", "image", "two_images", "text")]
    long = make_samples(config, "qwen3_5")["text"]
    long["input_ids"] = torch.arange(50, 50 + 150).numpy()
    return hidden_states(model, make_builder(config, "qwen3_5").build([*samples, long], vision=True))


def test_rows_of_equal_length_are_what_the_definition_says(model: PackedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    actual = of_a_pack(model)
    monkeypatch.setitem(KERNELS, "torch", token_by_token)
    use_packed_linear_attention(model.hf, FAMILY, "torch", CPU)
    torch.testing.assert_close(actual, of_a_pack(model), rtol=1e-4, atol=1e-5)


def test_kernels_are_given_what_keeps_samples_apart(model: PackedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the packages that read the arguments as the packages do."""
    expected, row = of_a_pack(model), []

    def convolution(x: Tensor, weight: Tensor, bias: None, *, seq_idx: Tensor, activation: str) -> Tensor:
        assert x.stride(1) == 1, "with seq_idx the package wants channels last"
        assert seq_idx.dtype == torch.int32
        row.append(seq_idx)
        parts = x.split(seq_idx[0].unique(return_counts=True)[1].tolist(), dim=2)
        return torch.cat([modeling_qwen3_5.causal_conv1d_fn(part, weight, bias, activation) for part in parts], dim=2)

    def delta_rule(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, **gates: Any) -> tuple:
        flags = {name: gates.pop(name) for name in ("use_qk_l2norm_in_kernel",)}
        parts = []
        for start, end in pairwise(cu_seqlens.tolist()):
            one = [values[:, start:end] for values in (query, key, value)]
            cut = {name: values[:, start:end] for name, values in gates.items()}
            parts.append(modeling_qwen3_5.torch_chunk_gated_delta_rule(*one, **cut, **flags)[0])
        return torch.cat(parts, dim=1), None

    for name, function in {"causal_conv1d": convolution, "fla.ops.gated_delta_rule": delta_rule}.items():
        module = ModuleType(name)
        setattr(module, {"fla.ops.gated_delta_rule": "chunk_gated_delta_rule"}.get(name, "causal_conv1d_fn"), function)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(linear, "choose_linear_kernel", lambda *_, **__: "fla")
    use_packed_linear_attention(model.hf, FAMILY, "fla", CUDA, half=True)
    torch.testing.assert_close(of_a_pack(model), expected, rtol=1e-4, atol=1e-5)
    assert row


class TestChoice:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        names = {"fla", "causal_conv1d"}
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in names else None)
        return names

    def test_packages_are_used_on_a_gpu_and_nowhere_else(self, installed: set[str]) -> None:
        assert choose_linear_kernel("auto", CUDA, half=True) == "fla"
        assert choose_linear_kernel("auto", CPU, half=True) == "torch"
        assert choose_linear_kernel("auto", CUDA, half=False) == "torch"
        assert choose_linear_kernel("torch", CUDA, half=True) == "torch"

    @pytest.mark.parametrize(
        ("module", "package"), [("fla", "flash-linear-attention"), ("causal_conv1d", "causal-conv1d")]
    )
    def test_missing_package_is_no_silent_slowness(self, module: str, package: str, installed: set[str]) -> None:
        installed.remove(module)
        with pytest.raises(ValueError, match=rf"'auto' needs the package {package}.*'torch', which trains 1.5 to 2.5"):
            choose_linear_kernel("auto", CUDA, half=True)
        assert choose_linear_kernel("auto", CPU, half=True) == "torch"

    @pytest.mark.parametrize(("device", "half", "reason"), [(CPU, True, "CUDA only"), (CUDA, False, "neither bf16")])
    def test_kernels_where_they_do_not_run_are_refused(
        self, device: torch.device, half: bool, reason: str, installed: set[str]
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            choose_linear_kernel("fla", device, half=half)


def test_key_heads_of_linear_attention_are_divided_evenly_or_not_at_all(model: PackedVLM) -> None:
    heads = divided_heads(model.hf.config.text_config)
    assert heads == {"attention heads": 4, "key heads of linear attention": 4}
    check_degree(4, 8, heads)
    with pytest.raises(ValueError, match=r"16 does not divide the model's 24 attention heads.*use a divisor of 8"):
        check_degree(16, 16, {"attention heads": 24, "key heads of linear attention": 16})
    with pytest.raises(ValueError, match="6 does not divide the model's 16 key heads of linear attention"):
        check_degree(6, 6, {"attention heads": 24, "key heads of linear attention": 16})

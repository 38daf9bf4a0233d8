"""Adapted layers by themselves: the base model until something is learned, what is merged, and what is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qvl_pipeline.engine.model.adapters.form import Form, scaling_of
from qvl_pipeline.engine.model.adapters.injection import adapt, enable
from qvl_pipeline.engine.model.adapters.linear import AdaptedLinear, row_lengths
from qvl_pipeline.engine.model.adapters.merging import merged
from qvl_pipeline.engine.model.adapters.targets import choose_targets
from qvl_pipeline.families import FAMILIES

FORMS = {
    "lora": Form(r=4, scaling=2.0),
    "dora": Form(r=4, scaling=2.0, dora=True),
    "pissa": Form(r=4, scaling=2.0, pissa=True),
    "dora with dropout": Form(r=4, scaling=2.0, dora=True, dropout=0.3),
}


def adapted(form: Form, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> AdaptedLinear:
    """A layer whose adapter is at its start; `B` is not zero where PiSSA subtracts what it starts at."""
    torch.manual_seed(0)
    base = nn.Linear(24, 16, bias=bias).to(dtype).requires_grad_(False)
    layer = AdaptedLinear(base, form)
    with torch.no_grad():
        nn.init.normal_(layer.lora_A)
        nn.init.zeros_(layer.lora_B)
        if form.pissa:
            nn.init.normal_(layer.lora_B)
            layer.lora_A0.copy_(layer.lora_A)
            layer.lora_B0.copy_(layer.lora_B)
        if form.dora:
            nn.init.zeros_(layer.lora_magnitude)
    return layer


def learned(layer: AdaptedLinear) -> AdaptedLinear:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
                assert name.startswith("lora_")
    return layer


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_base_layer_bit_for_bit(form: Form, bias: bool, dtype: torch.dtype) -> None:
    layer = adapted(form, bias=bias, dtype=dtype)
    x = torch.randn(5, 24, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    tensors = {name: p for name, p in layer.named_parameters() if name.startswith("lora_")}
    assert torch.equal(merged(layer.weight, tensors, form), layer.weight.float())
    learned(layer)
    assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.enabled = False
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_merged_matrix_computes_what_matrix_and_adapter_do(form: Form) -> None:
    layer = learned(adapted(form)).eval()
    x = torch.randn(5, 24)
    tensors = {name: p for name, p in layer.named_parameters() if name.startswith("lora_")}
    expected = nn.functional.linear(x, merged(layer.weight, tensors, form), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_lengths_of_rows_are_those_of_the_sum() -> None:
    layer = learned(adapted(FORMS["dora"]))
    own, whole = row_lengths(layer.weight, layer.lora_A, layer.lora_B, 2.0)
    torch.testing.assert_close(own, layer.weight.norm(dim=1))
    torch.testing.assert_close(whole, (layer.weight + 2.0 * layer.lora_B @ layer.lora_A).norm(dim=1))


def test_dropout_is_of_the_update_alone_and_of_training_alone() -> None:
    layer = learned(adapted(Form(r=4, scaling=2.0, dropout=0.5)))
    x = torch.randn(3, 24)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_scaling_is_by_the_rank_or_its_root() -> None:
    assert scaling_of(32, 16, rslora=False) == 2
    assert scaling_of(32, 16, rslora=True) == 8


class TestTargets:
    def test_all_of_the_language_model_and_nothing_of_the_vision_tower(
        self, hf_model: PreTrainedModel, family: str
    ) -> None:
        chosen = choose_targets(hf_model, FAMILIES[family], {"llm": "all"})
        owners = {name.removeprefix("model.language_model.layers.") for name in chosen}
        mlp = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        if FAMILIES[family].experts:
            of_all = [f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")]
            mlp = [*of_all, "mlp.shared_expert_gate"] if family == "qwen3_5_moe" else []
        softmax = [f"self_attn.{x}_proj" for x in "qkvo"]
        linear = [f"linear_attn.{x}" for x in (*(f"in_proj_{y}" for y in ("qkv", "z", "b", "a")), "out_proj")]
        attention = [linear, softmax, linear] if FAMILIES[family].linear_attention else [softmax] * 3
        assert owners == {f"{layer}.{kind}" for layer in range(3) for kind in attention[layer] + mlp}

    def test_kinds_and_globs_stay_in_their_part(self, hf_model: PreTrainedModel, family: str) -> None:
        mlp = ["*.layers.0.mlp.gate_proj"] * (not FAMILIES[family].experts)
        targets = {"llm": ["attention", *mlp], "merger": "all", "vit": "none"}
        chosen = choose_targets(hf_model, FAMILIES[family], targets)
        assert {n for n in chosen if "visual" in n} == {
            n for n, m in hf_model.named_modules() if n.startswith("model.visual.merger.") and isinstance(m, nn.Linear)
        }
        assert [n for n in chosen if "mlp" in n and "visual" not in n] == [
            "model.language_model.layers.0.mlp.gate_proj"
        ] * len(mlp)
        assert sum("_attn." in n for n in chosen) == (14 if FAMILIES[family].linear_attention else 12)

    def test_a_suffix_that_vision_has_too_does_not_hit_it(self, tiny_folders) -> None:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(tiny_folders("qwen2_5_vl"))
        assert any(n.startswith("model.visual") and n.endswith("gate_proj") for n, _ in model.named_modules())
        chosen = choose_targets(model, FAMILIES["qwen2_5_vl"], {"llm": ["*gate_proj"]})
        assert len(chosen) == 3
        assert all(n.startswith("model.language_model.") for n in chosen)

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (
                {"llm": ["q_proj"]},
                r"'q_proj' matches no linear layer of 'llm': use all, one of attention, mlp or a glob",
            ),
            ({"llm": ["*.qkv"]}, "'\\*.qkv' matches no linear layer of 'llm'"),
            ({"merger": ["attention"]}, "'attention' matches no linear layer of 'merger'"),
            ({"llm": "none"}, "names no part to adapt"),
        ],
    )
    def test_what_matches_nothing_is_an_error(self, hf_model, family: str, targets: dict, message: str) -> None:
        kinds = {"qwen3_vl_moe": "attention, experts", "qwen3_5_moe": "attention, experts, mlp"}
        message = message.replace("attention, mlp", kinds.get(family, "attention, mlp"))
        with pytest.raises(ValueError, match=message):
            choose_targets(hf_model, FAMILIES[family], targets)

    def test_a_part_without_linear_layers_is_an_error(self, tiny_folders) -> None:
        from qvl_pipeline.engine.model.weights import build_skeleton

        model = build_skeleton(str(tiny_folders("qwen2_5_vl")))
        with pytest.raises(ValueError, match=r"Qwen2\.5-VL has no linear layers in 'deepstack', but in "):
            choose_targets(model, FAMILIES["qwen2_5_vl"], {"deepstack": "all"})


def test_switched_off_a_model_is_its_base(hf_model: PreTrainedModel, family: str) -> None:
    ids = torch.tensor([[40, 41, 42, 43]])
    expected = hf_model(input_ids=ids).logits
    adapt(hf_model, choose_targets(hf_model, FAMILIES[family], {"llm": "all"}), FORMS["lora"])
    for module in hf_model.modules():
        if isinstance(module, AdaptedLinear):
            nn.init.normal_(module.lora_A)
            nn.init.normal_(module.lora_B)
    assert not torch.equal(hf_model(input_ids=ids).logits, expected)
    enable(hf_model, False)
    assert torch.equal(hf_model(input_ids=ids).logits, expected)

"""Adapters of experts: each has an update of its own, held to a plain loop, to peft, and to any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from qvl_pipeline.engine.model.adapters.attach import AttachedAdapter
from qvl_pipeline.engine.model.adapters.experts import FUSED, adapt_experts, fused_tensors
from qvl_pipeline.engine.model.adapters.form import Form
from qvl_pipeline.engine.model.adapters.injection import enable, inject
from qvl_pipeline.engine.model.adapters.targets import choose_targets
from qvl_pipeline.engine.model.weights import build_skeleton
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from tests.engine.adapters.test_peft import KINDS, assert_same_losses, loss_of, plain
from tests.engine.adapters.test_training import assert_same_training, rows, weights
from tests.engine.training import changed, make_training, trained

EXPERTS, WIDTH, INSIDE, CHOSEN = 4, 24, 16, 2
BOTH = {"type": "lora", "targets": {"llm": ["attention", "experts"]}}


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.experts])
def moe(request: pytest.FixtureRequest) -> str:
    return request.param


def experts_of(kernel: str) -> nn.Module:
    """The experts of a layer, with random tensors, below a module that names them."""
    torch.manual_seed(0)
    config = Qwen3VLMoeTextConfig(hidden_size=WIDTH, moe_intermediate_size=INSIDE, num_experts=EXPERTS)
    config._experts_implementation_internal = kernel
    layer = nn.Module()
    layer.experts = Qwen3VLMoeTextExperts(config).requires_grad_(False)
    for tensor in layer.experts.parameters():
        nn.init.normal_(tensor, std=0.3)
    return layer


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts that they go to (the last one gets none), and how much each counts."""
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:CHOSEN] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, CHOSEN, requires_grad=True)


def token_by_token(experts: nn.Module, hidden: Tensor, index: Tensor, counts: Tensor, scaling: float) -> Tensor:
    """The definition: whole matrices with their updates, for one token and one expert after the other."""

    def matrix(own: str, expert: int) -> Tensor:
        update = getattr(experts, f"{own}_update")
        return getattr(experts, own)[expert] + scaling * update.lora_B[expert] @ update.lora_A[expert]

    outputs = []
    for token, chosen, weights_of in zip(hidden, index.tolist(), counts, strict=True):
        parts = []
        for expert, weight in zip(chosen, weights_of, strict=True):
            gate, up = (matrix("gate_up_proj", expert) @ token).chunk(2)
            parts.append(weight * (matrix("down_proj", expert) @ (F.silu(gate) * up)))
        outputs.append(sum(parts))
    return torch.stack(outputs)


@pytest.mark.parametrize("r", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
def test_values_and_gradients_are_those_of_the_definition(kernel: str, r: int) -> None:
    layer = experts_of(kernel)
    for own in FUSED:
        adapt_experts(layer, f"experts.{own}", Form(r, scaling=2.0))
    added = [parameter for name, parameter in layer.named_parameters() if "lora_" in name]
    for parameter in added:
        nn.init.normal_(parameter, std=0.3)
    inputs = routed(11)
    trained_inputs = [*added, inputs[0], inputs[2]]
    expected = token_by_token(layer.experts, *inputs, 2.0)
    actual = layer.experts(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((actual * weight).sum(), trained_inputs),
        torch.autograd.grad((expected * weight).sum(), trained_inputs, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(tensor.grad is None for tensor in (layer.experts.gate_up_proj, layer.experts.down_proj))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_an_update_or_switched_off_they_are_transformers_own_bit_for_bit(dtype: torch.dtype) -> None:
    layer = experts_of("grouped_mm").to(dtype)
    hidden, index, counts = routed(11)
    inputs = hidden.to(dtype), index, counts.to(dtype)
    expected = layer.experts(*inputs)
    adapt_experts(layer, "experts.down_proj", Form(4, scaling=2.0))
    update = layer.experts.down_proj_update
    nn.init.normal_(update.lora_A)
    nn.init.zeros_(update.lora_B)
    assert torch.equal(layer.experts(*inputs), expected)
    nn.init.normal_(update.lora_B)
    assert not torch.equal(layer.experts(*inputs), expected)
    update.enabled = False
    assert torch.equal(layer.experts(*inputs), expected)


def test_experts_are_adapted_where_they_are_named_and_not_by_all(moe: str, tiny_folders: Callable[[str], Path]) -> None:
    model = build_skeleton(str(tiny_folders(moe)))
    fused = [f"model.language_model.layers.{n}.mlp.experts.{own}" for n in range(3) for own in FUSED]
    assert list(fused_tensors(model)) == fused
    assert choose_targets(model, FAMILIES[moe], {"llm": ["experts"]}) == fused
    assert choose_targets(model, FAMILIES[moe], {"llm": ["*.1.mlp.experts.down_proj"]}) == [fused[3]]
    assert not set(choose_targets(model, FAMILIES[moe], {"llm": "all"})) & set(fused)


@pytest.mark.parametrize(
    ("asked", "what"),
    [({"type": "dora"}, "type 'dora'"), ({"init": "pissa"}, "init 'pissa'"), ({"dropout": 0.1}, "dropout")],
)
def test_what_the_format_cannot_say_of_experts_is_refused(
    asked: dict[str, Any], what: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    training = make_training(tmp_path, tiny_folders("qwen3_vl_moe"), "qwen3_vl_moe", kinds=("text",))
    spec = changed(training, tmp_path / "run", adapter=BOTH | asked).adapter
    sentence = f"experts.gate_up_proj' is a fused tensor of experts, .* plain LoRA only: take out {what}"
    with pytest.raises(ValueError, match=sentence):
        inject(build_skeleton(training.model.path), FAMILIES["qwen3_vl_moe"], spec)


def test_any_number_of_ranks_trains_the_same_and_starts_as_the_base_model(
    moe: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders(moe), moe)
    specs = [changed(base, tmp_path / str(nproc), adapter=BOTH) for nproc in (1, 2, 4)]
    for nproc, spec in zip((1, 2, 4), specs, strict=True):
        trained(spec, nproc)
        assert_same_training(spec, specs[0])
    without = changed(base, tmp_path / "base", adapter={"type": "none"})
    assert trained(without, nproc=2)[0]["loss"] == rows(specs[1])[0]["loss"]
    result = json.loads((tmp_path / "2" / "result.json").read_text())
    assert result["adapter"]["modules"][f"{FAMILIES[moe].experts}.down_proj"] == 3
    before = load_file(Path(base.model.path) / "model.safetensors")
    same = {name for name, weight in weights(specs[1]).items() if torch.equal(weight, before[name])}
    changed_names = ("experts.gate_up_proj", "experts.down_proj", "_proj.weight", ".in_proj_", ".out_proj")
    assert same == {
        name
        for name in before
        if not (name.startswith("model.language_model.") and any(part in name for part in changed_names))
        or "shared_expert" in name
    }


def peft_folder(training: TrainSpec, folder: Path, tensors: tuple[str, ...]) -> Path:
    """An adapter of experts as peft makes it, not at its start: both of its factors are random."""
    torch.manual_seed(1)
    model = plain(training)
    names = [name for name in fused_tensors(model) if name.endswith(tensors)]
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=names, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tensors", [FUSED, FUSED[:1], FUSED[1:]], ids="+".join)
def test_peft_reads_ours_and_ours_is_read_from_peft(
    tensors: tuple[str, ...], moe: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders(moe), moe, KINDS[moe][:3], packs_per_step=3)
    start = peft_folder(base, tmp_path / "peft", tensors)
    adapter = {"type": "lora", "targets": {"llm": [f"*.experts.{own}" for own in tensors]}, "start_from": str(start)}
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}
    training = changed(base, tmp_path / "run", adapter=adapter, optim=still)
    trained(training, nproc=2)
    folder = Path(training.export.output_dir) / "adapter"
    theirs = load_file(start / "adapter_model.safetensors")
    ours = load_file(folder / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert_same_losses(training, folder)


def test_an_attached_adapter_answers_as_peft_does_and_switched_off_as_the_base(
    moe: str, tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path / "data", tiny_folders(moe), moe, KINDS[moe][:1], packs_per_step=1)
    start, model = peft_folder(base, tmp_path / "peft", FUSED), plain(base)
    with torch.no_grad():
        expected = loss_of(model, base, [0])
        attached = AttachedAdapter(model, start)
        assert not torch.allclose(loss_of(model, base, [0]), expected, rtol=1e-4)
        attached.switch(on=False)
        assert torch.equal(loss_of(model, base, [0]), expected)
        attached.switch(on=True)
        enable(model, False)
        assert torch.equal(loss_of(model, base, [0]), expected)

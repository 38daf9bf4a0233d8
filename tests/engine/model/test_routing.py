"""The balance loss: transformers' own on one batch, and the same for any split of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.model.routing import StepBalance, choose_experts_kernel, expert_load
from qvl_pipeline.engine.spec import RecomputeSpec
from qvl_pipeline.families import FAMILIES
from tests.engine.model.test_packed_vlm import KINDS, assert_same_gradients, gradients, inputs_of
from tests.engine.packs import load_packed, make_builder, make_samples

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.router])
def moe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(moe: str, tiny_folders: Callable[[str], Path]) -> PackedVLM:
    return load_packed(tiny_folders(moe), moe)


def of_a_step(
    model: PackedVLM, split: Sequence[Sequence[str]], *, rmpad: bool = True
) -> tuple[float, dict[str, torch.Tensor]]:
    """Balance loss of a step of these micro-batches, and its gradients alone."""
    config, moe = model.hf.config, model.family.name
    builder, samples = make_builder(config, moe, rmpad=rmpad), make_samples(config, moe)
    batches = [builder.build([samples[kind] for kind in kinds], vision=True) for kinds in split]
    balance = StepBalance(model.routing)
    if len(batches) > 1:
        balance.count(model(batch) for batch in batches)
    total = 0.0
    model.zero_grad()
    for batch in batches:
        model(batch)
        loss = balance.loss()
        loss.backward()
        total += loss.item()
    return total, {name: grad.clone() for name, grad in gradients(model).items()}


@pytest.mark.parametrize("kind", ["text", "image_and_video"])
def test_one_unpadded_batch_has_the_loss_of_transformers(
    kind: str, model: PackedVLM, moe: str, tiny_folders: Callable[[str], Path]
) -> None:
    hf = AutoModelForImageTextToText.from_pretrained(tiny_folders(moe), dtype=torch.float32)
    inputs = inputs_of(hf.config, make_samples(hf.config, moe)[kind], make_builder(hf.config, moe))
    expected = hf(**inputs, output_router_logits=True).aux_loss
    expected.backward()
    loss, grads = of_a_step(model, [[kind]])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    theirs = {name: grad for name, grad in gradients(hf).items() if name in {n.removeprefix("hf.") for n in grads}}
    ours = {name.removeprefix("hf."): grad for name, grad in grads.items() if name.removeprefix("hf.") in theirs}
    assert any("mlp.gate" in name for name in ours)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(
    "split", [[[kind] for kind in KINDS], [KINDS[:2], KINDS[2:]], [KINDS, []]], ids=["each", "two", "an empty one"]
)
def test_any_split_of_a_step_has_the_same_loss_and_gradients(model: PackedVLM, split: list[list[str]]) -> None:
    expected, whole = of_a_step(model, [KINDS])
    recompute_activations(model.hf, RecomputeSpec("full", "none", 1, False))
    model.train()
    loss, grads = of_a_step(model, split)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients({name: grads.get(name, torch.zeros_like(grad)) for name, grad in whole.items()}, whole)


def test_padding_is_no_token(model: PackedVLM, moe: str, tiny_folders: Callable[[str], Path]) -> None:
    padded = load_packed(tiny_folders(moe), moe, rmpad=False)
    (expected, whole), (loss, grads) = of_a_step(model, [KINDS]), of_a_step(padded, [KINDS], rmpad=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(grads, whole)


def test_samples_that_are_left_out_do_not_raise_its_weight(model: PackedVLM) -> None:
    """Gradients of a step are divided again by what is left of its tokens."""
    config, moe = model.hf.config, model.family.name
    builder, samples = make_builder(config, moe), make_samples(config, moe)
    model(builder.build([samples["text"]], vision=False))
    whole, some = StepBalance(model.routing).loss(), StepBalance(model.routing, lambda: 0.25).loss()
    assert some.item() == pytest.approx(0.75 * whole.item())


def test_load_of_experts_is_told_by_layer() -> None:
    load: dict[str, Any] = expert_load(torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert load["expert_max_over_mean"] == {"layer_0": 4.0, "layer_1": 1.0}
    assert load["dead_experts"] == {"layer_0": 0.75, "layer_1": 0.0}


def test_grouped_products_are_chosen_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_experts_kernel("auto", torch.device("cpu")) == "grouped_mm"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert choose_experts_kernel("auto", torch.device("cuda")) == "eager"
    with pytest.raises(ValueError, match="'grouped_mm' needs an NVIDIA GPU from Ampere on"):
        choose_experts_kernel("grouped_mm", torch.device("cuda"))

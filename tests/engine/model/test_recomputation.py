"""Gradient checkpointing and torch.compile change how the blocks run, never what they compute."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.gpu import NO_ADAPTER
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.feed.batch_loader import LoaderOptions, load_batches
from qvl_pipeline.engine.feed.steps import SharedSteps, read_plan
from qvl_pipeline.engine.model.adapters.adapted import adapted_layers
from qvl_pipeline.engine.model.adapters.injection import inject
from qvl_pipeline.engine.model.attention.packed import use_packed_attention
from qvl_pipeline.engine.model.compilation import compile_blocks
from qvl_pipeline.engine.model.flops import flops_of
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.recomputation import recompute_activations
from qvl_pipeline.engine.run.stopping import StopRequest
from qvl_pipeline.engine.run.watchdog import Watchdog
from qvl_pipeline.engine.spec import RecomputeSpec, TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training


def count_blocks(model: PackedVLM) -> Counter[str]:
    """Count the forward passes of each kind of block from now on, recomputed ones included."""
    calls: Counter[str] = Counter()
    kinds = {model.family.decoder_layer: "llm", model.family.vision_block: "vit"}
    for module in model.modules():
        if kind := kinds.get(type(module).__name__.removeprefix("FSDP")):
            # Not of the block itself: newer transformers checkpoint its forward, whose hooks then stay outside.
            module.mlp.register_forward_pre_hook(lambda *_, kind=kind: calls.update([kind]))
    return calls


def gradients(model: PackedVLM, builder: BatchBuilder, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(builder.build(samples, vision=True)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("spec", "again"),
    [
        (RecomputeSpec("full", "none", 1, False), {"llm": 3}),
        (RecomputeSpec("none", "full", 1, False), {"vit": 2}),
        (RecomputeSpec("full", "full", 1, False), {"llm": 3, "vit": 2}),
        (RecomputeSpec("selective", "full", 1, False), {"llm": 3, "vit": 2}),
        (RecomputeSpec("full", "selective", 2, False), {"llm": 2, "vit": 1}),
        (RecomputeSpec("selective", "full", 1, True), {"llm": 3, "vit": 2}),
    ],
    ids=str,
)
def test_recomputing_leaves_losses_and_gradients_as_they_are_bit_for_bit(
    spec: RecomputeSpec, again: dict[str, int], packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict]
) -> None:
    packed.train()
    batch = [samples["text"], samples["image_and_video"]]
    calls = count_blocks(packed)
    expected = gradients(packed, builder, batch)
    once = Counter(calls)
    assert recompute_activations(packed.hf, spec) == again
    calls.clear()
    actual = gradients(packed, builder, batch)
    assert calls - once == again
    assert all(torch.equal(gradient, expected[name]) for name, gradient in actual.items())


def grouped_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of a product in groups, of which torch knows none: `[S, K]` by `[E, K, N]`, or `[K, S]` by `[S, N]`."""
    return 2 * left[0] * left[1] * right[-1]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("adapted", [False, True])
def test_selective_recomputation_repeats_no_large_product(
    kernel: str, adapted: bool, packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict]
) -> None:
    """By torch's own count: a full one repeats the forward pass of the blocks, a selective one LoRA's second matrix."""
    use_packed_attention(packed.hf, kernel, kernel, torch.device("cpu"))
    low_rank = 0
    if adapted:
        targets = {"llm": ["attention", "experts"] if packed.family.experts else "all"}
        inject(packed.hf, packed.family, dataclasses.replace(NO_ADAPTER, type="lora", r=4, targets=targets))
        layers = [layer for _, layer in adapted_layers(packed.hf)]
        for parameter in [p for layer in layers for p in (layer.lora_A, layer.lora_B)]:
            torch.nn.init.normal_(parameter)
        # Of experts those that a token goes to, whose rank of 4 products in groups fill up to 8.
        chosen = {2: lambda factor: factor.numel(), 3: lambda factor: 2 * packed.routing.top_k * factor[0].numel()}
        low_rank = sum(2 * chosen[layer.lora_B.ndim](layer.lora_B) for layer in layers)
    packed.train()
    batch = builder.build([samples["text"], samples["image_and_video"]], vision=True)

    def flops(llm: str) -> int:
        recompute_activations(packed.hf, RecomputeSpec(llm, "none", 1, False))
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
        with counter as mode, set_checkpoint_early_stop(False):
            packed(batch).sum().backward()
        return mode.get_total_flops()

    once, selective, full = flops("none"), flops("selective"), flops("full")
    forward = flops_of(packed)  # which counts three forward passes, two of them for the gradients
    family, tokens = packed.family, len(batch.input_ids[0])
    repeated = selective - once - low_rank * tokens
    if family.linear_attention:  # the products in the steps of its linear attention are small and many, and made again
        assert 0 < repeated < 0.1 * (full - once)
    else:
        assert repeated == 0
    assert full - once > 0.9 * forward.per_token / 3 * tokens


def test_offloaded_inputs_are_not_held_beside_their_copies(
    packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict]
) -> None:
    packed.train()
    batch = builder.build([samples["image"]], vision=True)
    inputs: list[weakref.ref] = []
    for block in packed.hf.model.language_model.layers[1:]:
        block.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))

    def held(offload: bool) -> list[bool]:
        recompute_activations(packed.hf, RecomputeSpec("full", "full", 1, offload))
        inputs.clear()
        loss = packed(batch).sum()
        alive = [reference() is not None for reference in inputs]
        loss.backward()
        return alive

    assert held(offload=False) == [True, True]
    assert held(offload=True) == [False, False]


def same_calls_on_all_ranks(spec: TrainSpec) -> None:
    """Run one step on two ranks, of which the first has text only, and compare the blocks' forward passes."""
    trainer = Trainer(spec, StopRequest(), Watchdog(60.0, lambda error, where: None))
    (step,) = SharedSteps(read_plan(Path(spec.data.pack_plan)), dist.get_rank(), 2, packs_per_micro_batch=1)
    calls = count_blocks(trainer.model)
    options = LoaderOptions(num_workers=0, prefetch_factor=1, pin_memory=False, skip_bad_samples=False)
    for batch in load_batches(step.micro_batches, Path(spec.data.tokenized), trainer.builder, options):
        trainer.model(batch).sum().backward()
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, dict(calls))
    vision = trainer.model.hf.config.vision_config.depth
    assert everywhere[0] == everywhere[1]
    assert everywhere[0]["vit"] == 2 * vision  # forward and recomputation in the one micro-batch that has media


def test_text_only_rank_recomputes_the_tower_as_often_as_the_others(
    tiny_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_training(tmp_path, tiny_folders("qwen3_vl"), "qwen3_vl", kinds=("text", "image", "text", "text"))
    spec = changed(base, tmp_path / "run", recompute={"llm": "full", "vit": "full"})
    run_ranks(same_calls_on_all_ranks, 2, spec, log_dir=tmp_path / "logs")


@pytest.mark.filterwarnings("error:Dynamo detected")  # a cache that it would trace through
@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_compiled_blocks_compute_the_same_for_packs_of_any_length(
    packed: PackedVLM, builder: BatchBuilder, samples: dict[str, dict]
) -> None:
    torch._dynamo.reset()
    packed.train()
    del packed.hf.model.language_model.layers[1:], packed.hf.model.visual.blocks[1:]  # tracing is slow
    sample = samples["image"]
    shorter = sample | {"input_ids": sample["input_ids"][:-2], "label_spans": sample["label_spans"] - [[0, 2]]}
    batches = [[sample], [shorter]]
    expected = [gradients(packed, builder, batch) for batch in batches]
    names = list(packed.state_dict())
    compiled = compile_blocks(packed.hf, packed.family, backend="eager", mode="default")
    assert compiled == {packed.family.decoder_layer: 1, packed.family.vision_block: 1}
    assert list(packed.state_dict()) == names
    graphs = []
    for batch, reference in zip(batches, expected, strict=True):
        assert_same(gradients(packed, builder, batch), reference)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]  # none was made anew for the other length
    for kind in ("full", "selective"):
        recompute_activations(packed.hf, RecomputeSpec(kind, kind, 1, False))
        assert_same(gradients(packed, builder, batches[0]), expected[0])


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

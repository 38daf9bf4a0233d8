"""Weights, gradients and optimizer state of a rank are those that FSDP2 itself shards, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.gpu import OPTIM, PARALLEL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForImageTextToText

from qvl_pipeline.engine.model.freezing import freeze, hold_parameters
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.sharded import shard_model
from qvl_pipeline.engine.optim.optimization import make_optimizers
from qvl_pipeline.engine.parallel import sharding
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.facts import MODELS
from qvl_pipeline.preflight.memory.rank import Step, optimizer_bytes
from qvl_pipeline.preflight.memory.units import units_of

RANKS = 8


def cut(name: str) -> Any:
    """Return a published model's configuration with two layers and two blocks."""
    config = MODELS[name].config()
    config["text_config"]["num_hidden_layers"] = config["vision_config"]["depth"] = 2
    if "audio_config" in config:
        config["audio_config"]["encoder_layers"] = 2
    for indexes in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if indexes in config["vision_config"]:
            config["vision_config"][indexes] = [1]
    return AutoConfig.for_model(**config)


@pytest.fixture
def ranks() -> Iterator[None]:
    """The first of several ranks, of which the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("frozen", [(), ("visual",)], ids=["all trained", "vision frozen"])
@pytest.mark.parametrize("name", ["Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct", "Qwen/Qwen2.5-Omni-7B"])
def test_states_of_a_rank_are_exact(
    name: str, frozen: tuple[str, ...], ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))  # its numbers must not be fake
    monkeypatch.setattr(sharding, "_sharding_mesh", lambda *_: mesh)
    family = FAMILIES[MODELS[name].family]
    spec = SimpleNamespace(optim=OPTIM, parallel=replace(PARALLEL, bf16=True))
    with FakeTensorMode():
        hf = AutoModelForImageTextToText.from_config(cut(name), dtype=torch.float32)
        freeze(hf, family, frozen)
        hold_parameters(hf, trained=torch.float32, frozen=torch.bfloat16)
        model = PackedVLM(hf, family, [0.5] * 3, [0.5] * 3)
        step = Step(units_of(model, RANKS, spec), {}, [], 1)
        shard_model(model, torch.device("cpu"), spec.parallel)
        (optimizer,) = make_optimizers(model, spec.optim)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            optimizer.step()
        held = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
    steps = 4 * sum(parameter.requires_grad for parameter in model.parameters())  # AdamW counts its steps, in float32
    assert held[_FSDPRefType.SHARDED_PARAM] == step.total("weights")
    assert held[_FSDPRefType.SHARDED_GRAD] == step.total("gradients")
    assert held[_FSDPRefType.OPT] == optimizer_bytes(step, spec) + steps

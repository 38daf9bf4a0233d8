"""Tiny models of all families and samples with random pixels, as the engine gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from qvl_pipeline.demo import tiny_model
from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES, ModelFamily
from tests.engine.packs import load_packed, make_builder, make_samples
from tests.engine.training import changed, make_training, trained

# Few blocks, but of every kind: with and without DeepStack, of windows and of whole images, of softmax and of linear
# attention. What a step of a tiny model costs depends on the number of its parameters, not on their sizes.
FEW_BLOCKS = {
    "qwen3_vl": ({}, {"depth": 2, "deepstack_visual_indexes": [0, 1]}),
    # A weight of the balance loss with which it is no small part of every gradient.
    "qwen3_vl_moe": ({"router_aux_loss_coef": 0.2}, {"depth": 2, "deepstack_visual_indexes": [0, 1]}),
    "qwen2_5_vl": ({}, {"depth": 2, "fullatt_block_indexes": [1]}),
    "qwen2_5_omni": ({}, {"depth": 2, "fullatt_block_indexes": [1]}),
    "qwen3_5": (
        # What a head reads from a state that is still empty is next to nothing, and the norm behind it would make of
        # the rounding of that a difference of more than 1e-5.
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "rms_norm_eps": 1e-3},
        {"depth": 2},
    ),
    "qwen3_5_moe": (
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "rms_norm_eps": 1e-3,
            "router_aux_loss_coef": 0.2,
        },
        {"depth": 2},
    ),
}


def publish(folder: Path, family: ModelFamily) -> None:
    """Give a checkpoint the form of published ones: weights that transformers has no module for, experts transposed."""
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for prefix in family.kept_prefixes:
        weights[f"{prefix}fc.weight"] = torch.randn(6, 4, generator=generator).bfloat16()
        weights[f"{prefix}norm.weight"] = torch.randn(4, generator=generator)
    for name, weight in weights.items():
        if name.endswith(family.transposed_in_hub):
            weights[name] = weight.transpose(-1, -2).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            config, (text, vision) = tiny_model.CONFIGS[family], FEW_BLOCKS[family]
            with (
                mock.patch.dict(config["text_config"], num_hidden_layers=3, **text),
                mock.patch.dict(config["vision_config"], vision),
            ):
                corpus = ["which digit is this?", "seven"]
                tiny_model.build_tiny_model(folders[family], family=family, seed=0, corpus=corpus)
            publish(folders[family], FAMILIES[family])
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def trainings(
    tmp_path_factory: pytest.TempPathFactory, tiny_folders: Callable[[str], Path]
) -> Callable[[str], TrainSpec]:
    """A training of each family that has run on two ranks, with a checkpoint after each of its three steps."""
    made: dict[str, TrainSpec] = {}

    def training(family: str) -> TrainSpec:
        if family not in made:
            base = make_training(tmp_path_factory.mktemp("training"), tiny_folders(family), family)
            run = {"save_steps": 1, "save_total_limit": 3}
            made[family] = changed(base, Path(base.run.output_dir), run=run)
            trained(made[family], nproc=2)
        return made[family]

    return training


# A family that hears has tests of its own, with sounds in the packs.
@pytest.fixture(params=[name for name in FEW_BLOCKS if not FAMILIES[name].hearing])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hf_model(family: str, tiny_folders: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(tiny_folders(family), dtype=torch.float32)


@pytest.fixture
def packed(family: str, tiny_folders: Callable[[str], Path]) -> PackedVLM:
    return load_packed(tiny_folders(family), family)


@pytest.fixture
def builder(family: str, hf_model: PreTrainedModel) -> BatchBuilder:
    return make_builder(hf_model.config, family)


@pytest.fixture
def samples(family: str, hf_model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    return make_samples(hf_model.config, family)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """This process is the only rank of a job."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()

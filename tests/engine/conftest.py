"""Tiny models of both families and samples with random pixels, as the engine gets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from qvl_pipeline.demo import tiny_model
from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from tests.engine.packs import load_packed, make_builder, make_samples

# Few blocks, but of every kind: with and without DeepStack, of windows and of whole images. What a step of a tiny model
# costs depends on the number of its parameters, not on their sizes.
VISION_BLOCKS = {
    "qwen3_vl": (tiny_model.QWEN3_VL, {"depth": 2, "deepstack_visual_indexes": [0, 1]}),
    "qwen2_5_vl": (tiny_model.QWEN2_5_VL, {"depth": 2, "fullatt_block_indexes": [1]}),
    "qwen2_5_omni": (tiny_model.QWEN2_5_OMNI, {"depth": 2, "fullatt_block_indexes": [1]}),
}


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            config, vision = VISION_BLOCKS[family]
            with (
                mock.patch.dict(config["text_config"], num_hidden_layers=3),
                mock.patch.dict(config["vision_config"], vision),
            ):
                corpus = ["which digit is this?", "seven"]
                tiny_model.build_tiny_model(folders[family], family=family, seed=0, corpus=corpus)
        return folders[family]

    return folder


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
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

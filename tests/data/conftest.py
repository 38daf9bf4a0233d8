from __future__ import annotations

from pathlib import Path

import pytest
from transformers import ProcessorMixin

from qvl_pipeline.config import ModelConfig
from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.pipelines.tokenize.nodes import prepare_base_model
from tests.data.samples import CORPUS, samples_table


@pytest.fixture(scope="session", params=["qwen3_vl", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(processor_type=request.param, image_min_pixels=56 * 56, image_max_pixels=200 * 200)


@pytest.fixture(scope="session")
def base_model(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / model.processor_type
    corpus = samples_table([{"messages": [("user", text), ("assistant", "7")]} for text in CORPUS])
    prepare_base_model(corpus, model)(folder)
    return folder


@pytest.fixture
def processor(base_model: Path, model: ModelConfig) -> ProcessorMixin:
    return load_processor(base_model, model)

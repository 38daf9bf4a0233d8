from __future__ import annotations

from pathlib import Path

import pytest

from qvl_pipeline.demo.digits import build_digits
from qvl_pipeline.demo.tiny_model import build_tiny_model


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return ["Which digit is this?", "Which way does it move?", "What is the last digit of 4817?"]


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    build_digits(folder, seed=3, train_samples=220, eval_samples=70)
    return folder


@pytest.fixture(scope="session", params=["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model_folder(family: str, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    build_tiny_model(folder, family=family, seed=0, corpus=corpus)
    return folder

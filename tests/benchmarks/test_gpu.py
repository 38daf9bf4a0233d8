from __future__ import annotations

import pytest
import torch
from benchmarks.gpu import MODELS, TINY, compare, numerics


def test_runs_at_a_tiny_size_and_says_what_this_device_cannot_run() -> None:
    rows, ratios = compare(TINY, tokens=256, steps=1)
    done = {row["attention"] for row in rows if row["tokens_per_second"]}
    assert {"sdpa", "padded"} <= done
    assert all(row["note"] for row in rows if not row["tokens_per_second"])
    assert ratios["tiny_qwen3_vl_packed_to_padded_tokens_per_second"] > 0


def test_sdpa_agrees_with_eager_attention() -> None:
    rows = numerics(TINY["tiny_qwen3_vl"], torch.device("cpu"))
    errors = {(row["attention"], row["dtype"]): row["gradient_error"] for row in rows}
    assert errors["sdpa", "float32"] < 1e-4
    assert errors["sdpa", "float32"] < errors["sdpa", "bfloat16"] < 0.2


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen3_vl_4b", 4.4e9), ("qwen2_5_vl_3b", 3.75e9), ("qwen2_5_vl_7b", 8.29e9)]
)
def test_dimensions_are_those_of_the_published_models(name: str, parameters: float) -> None:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(MODELS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.02)

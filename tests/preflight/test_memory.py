"""The memory that is foretold is the memory that is taken."""

from __future__ import annotations

import pytest
from benchmarks.preflight.cpu import expected, measured
from benchmarks.preflight.gpu_rows import expected_gib, measured_rows
from benchmarks.preflight.settings import GRID

ROWS = [("qwen3_vl_4b", "eager"), ("qwen2_5_vl_3b", "liger"), ("qwen2_5_vl_7b", "eager")]
SETTINGS = ["1024 tokens", "all recomputed, Qwen2.5-VL", "selective", "LoRA", "vision frozen, all recomputed"]
SETTINGS += ["1024 tokens, Qwen2.5-Omni", "vision frozen, Qwen2.5-Omni"]


@pytest.mark.parametrize(("model", "blocks"), ROWS)
def test_as_measured_on_a_gpu(model: str, blocks: str) -> None:
    (row,) = (row for name, row in measured_rows() if name == model and row["blocks"] == blocks)
    assert expected_gib(model, row) == pytest.approx(row["memory_gib"], rel=0.10)


def test_as_counted_by_torch_on_a_cpu() -> None:
    settings = [setting for setting in GRID if setting.name in SETTINGS]
    assert len(settings) == len(SETTINGS)
    for setting, peak in zip(settings, measured(settings), strict=True):
        assert expected(setting) == pytest.approx(peak, rel=0.12), setting.name

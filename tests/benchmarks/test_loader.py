from __future__ import annotations

import pytest
from benchmarks.loader import ENCODINGS, HF, IMAGES, measure, ratios


def test_loads_the_pixels_of_the_processor_at_a_rate() -> None:
    rows = measure(rounds=1, smaller=8)
    assert len(rows) == 3 * len(IMAGES) + 2 + len(ENCODINGS)
    assert all(row["per_cpu_second"] == pytest.approx(1e3 / row["ms_of_cpu"]) for row in rows)
    # What is decoded by the same library is the same; torchvision's decoder of JPEG differs by a level.
    assert {row["levels"] < 0.01 for row in rows if row["contender"] == "ours" and row["levels"] is not None} == {True}
    assert {row["levels"] <= 1.01 for row in rows if row["contender"] == "torchvision's decoder"} == {True}
    assert len(ratios(rows)) == len(IMAGES) + 1 + len(ENCODINGS)
    assert all(key.endswith(f"ours over {HF}") and value > 0 for key, value in ratios(rows).items())

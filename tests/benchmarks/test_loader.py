from __future__ import annotations

import pytest
from benchmarks.loader import DECODING, ENCODINGS, HF, IMAGES, measure, ratios


def test_loads_the_pixels_of_the_processor_at_a_rate() -> None:
    rows = measure(rounds=1, smaller=8)
    assert len(rows) == 4 * len(IMAGES) + 2 + len(ENCODINGS)
    assert all(row["per_cpu_second"] == pytest.approx(1e3 / row["ms_of_cpu"]) for row in rows)
    levels = {(row["case"], row["contender"]): row["levels"] for row in rows}
    assert {name for (_, name), level in levels.items() if level is None} == {HF, DECODING}
    # What is decoded by the same library is the same; torchvision's decoder of JPEG differs by a level.
    assert {level < 0.01 for (_, name), level in levels.items() if name.startswith("ours") and "jpeg" not in name} == {
        True
    }
    assert {level <= 1.01 for (_, name), level in levels.items() if name == "torchvision's decoder"} == {True}
    assert len(ratios(rows)) == len(IMAGES) + 1 + len(ENCODINGS)
    assert all(key.endswith(f" over {HF}") and value > 0 for key, value in ratios(rows).items())
    assert {row["times_as_fast"] for row in rows if row["contender"] == HF} == {1}

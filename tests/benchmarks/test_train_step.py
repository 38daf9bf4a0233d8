from __future__ import annotations

import pytest
from benchmarks.train_step import CONTENDERS, compare


def test_contenders_run_at_a_tiny_size_and_are_compared() -> None:
    rows, ratios = compare(samples=120, rounds=1)
    assert [row["contender"] for row in rows] == list(CONTENDERS)
    for kind, suffix in (("tokens_per_second", ""), ("tokens_per_cpu_second", "_cpu")):
        speeds = {row["contender"]: row[kind] for row in rows}
        assert min(speeds.values()) > 0
        assert ratios[f"bare_loop_over_ours{suffix}"] == pytest.approx(speeds["bare loop"] / speeds["ours"])
        assert ratios[f"ours_over_trainer{suffix}"] == pytest.approx(speeds["ours"] / speeds["Trainer"])
    assert len(ratios) == 8

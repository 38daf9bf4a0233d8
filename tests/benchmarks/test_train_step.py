from __future__ import annotations

from importlib.util import find_spec

import pytest
from benchmarks.train_step import CONTENDERS, compare


def test_contenders_run_at_a_tiny_size_and_are_compared() -> None:
    # accelerate, which transformers' Trainer needs, is a package for development only.
    contenders = CONTENDERS if find_spec("accelerate") else CONTENDERS[:2]
    rows, ratios = compare(samples=120, rounds=1, contenders=contenders)
    assert [row["contender"] for row in rows] == list(contenders)
    speeds = {row["contender"]: row["tokens_per_second"] for row in rows}
    assert min(speeds.values()) > 0
    assert ratios["ours_to_bare_loop_time"] == pytest.approx(speeds["bare loop"] / speeds["ours"])
    assert len(ratios) == len(contenders) - 1

from __future__ import annotations

import pytest

from tests.benchmarks.afresh import call


def test_contenders_run_at_a_tiny_size_and_are_compared() -> None:
    contenders = ("ours", "bare loop", "Trainer at its best")
    rows, ratios = call("benchmarks.train_step", "compare", samples=120, rounds=1, contenders=contenders)
    assert [row["contender"] for row in rows] == list(contenders)
    expected = {}
    for kind, suffix in (("tokens_per_second", ""), ("tokens_per_cpu_second", "_cpu")):
        ours, bare, trainer = (row[kind] for row in rows)
        assert min(ours, bare, trainer) > 0
        expected |= {
            f"bare_loop_over_ours{suffix}": bare / ours,
            f"ours_over_trainer_at_its_best{suffix}": ours / trainer,
        }
    assert ratios == pytest.approx(expected)

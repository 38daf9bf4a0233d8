from __future__ import annotations

import pytest
from benchmarks.feeding import TOKENS_PER_SECOND

from tests.benchmarks.afresh import call


def test_ranks_take_batches_and_it_is_known_how_long_they_wait() -> None:
    rows = call("benchmarks.feeding", "measure", ranks=2, cores=0.2, batches=8, smaller=8)
    assert [row["ranks"] for row in rows] == [2, 2, 1, 1]
    assert all(row["cores_a_gpu"] == pytest.approx(TOKENS_PER_SECOND / row["tokens_a_core"]) for row in rows)
    assert all(0 <= row["waits"] < 1 for row in rows)
    fed = rows[:2]
    # No more is taken than the loaders are given: `auto` has a process for each rank then.
    assert all(row["tokens_per_second"] * row["ranks"] <= 0.2 * row["tokens_a_core"] * 1.001 for row in fed)
    assert {row["loader_processes"] for row in fed} == {1}

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.packing import PATCH_BUDGETS, measure, next_fit, samples


def test_next_fit_never_looks_back() -> None:
    lengths = np.array([60, 50, 30, 40, 10])
    packs = next_fit(lengths, np.zeros(5), max_tokens=100, max_patches=None, rng=np.random.default_rng(1))
    order = np.random.default_rng(1).permutation(5)
    assert packs.samples.tolist() == order.tolist()
    sums = packs.sums(lengths)
    firsts = lengths[order[packs.bounds[1:-1]]]
    assert (sums <= 100).all()
    assert (sums[:-1] + firsts > 100).all()


@pytest.mark.parametrize("data", PATCH_BUDGETS)
def test_best_fit_fills_packs_better_than_next_fit(data: str) -> None:
    ours, theirs = (measure(strategy, data, 5_000) for strategy in ("best_fit", "next_fit"))
    assert ours["fill"] > max(0.95, theirs["fill"] + 0.05)
    assert ours["packs"] * 16_384 >= samples(data, 5_000)[0].sum()


@pytest.mark.parametrize("data", PATCH_BUDGETS)
def test_a_stream_can_be_balanced_and_full(data: str) -> None:
    even, plain = (measure(f"stream, {strategy}", data, 5_000) for strategy in ("balanced", "best_fit"))
    assert even["work_spread"] < plain["work_spread"]
    assert even["fill"] > 0.9

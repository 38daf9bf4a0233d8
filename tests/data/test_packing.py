from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_pipeline.data.packing import best_fit, first_fit, one_each

PACKERS = [best_fit, first_fit]
SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 300)), max_size=60)


def arrays(samples: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths, patches = np.array(samples, dtype=np.int32).reshape(-1, 2).T
    return lengths, patches


def log_normal(count: int, max_tokens: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(6.5, 1.0, count), 16, max_tokens).astype(np.int32)


@pytest.mark.parametrize("packer", PACKERS)
@settings(max_examples=150, deadline=None)
@given(samples=SAMPLES, max_patches=st.none() | st.integers(300, 900), seed=st.integers(0, 3))
def test_every_sample_is_in_one_pack_and_no_budget_is_exceeded(packer, samples, max_patches, seed) -> None:
    lengths, patches = arrays(samples)
    rng = np.random.default_rng(seed)
    packs = packer(lengths, patches, max_tokens=100, max_patches=max_patches, rng=rng)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(samples)))
    for pack in packs:
        assert pack
        assert lengths[pack].sum() <= 100
        assert max_patches is None or patches[pack].sum() <= max_patches


@pytest.mark.parametrize("packer", PACKERS)
def test_packs_are_99_percent_full_on_log_normal_lengths(packer) -> None:
    lengths = log_normal(20_000, 16_384)
    rng = np.random.default_rng(1)
    packs = packer(lengths, np.zeros_like(lengths), max_tokens=16_384, max_patches=None, rng=rng)
    assert lengths.sum() / (len(packs) * 16_384) >= 0.99


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("max_patches", [65_536, 32_768, 16_384])
def test_packs_are_full_where_vision_patches_are_the_scarcer_budget(packer, max_patches: int) -> None:
    lengths = log_normal(5_000, 16_384)
    patches = np.minimum(4 * lengths * (np.arange(len(lengths)) % 10 > 0), max_patches)
    rng = np.random.default_rng(1)
    packs = packer(lengths, patches, max_tokens=16_384, max_patches=max_patches, rng=rng)
    fewest = max(lengths.sum() / 16_384, patches.sum() / max_patches)
    assert len(packs) <= 1.05 * fewest + 1


def test_best_fit_puts_the_largest_first_and_each_into_the_fullest_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl_pipeline.data.packing.SIZE_NOISE", 0.0)
    lengths = np.array([50, 20, 70, 30, 25])
    packs = best_fit(lengths, np.zeros(5), max_tokens=100, max_patches=None, rng=np.random.default_rng(0))
    # 70 | 50 | 30 joins 70 (full) | 25 and 20 join 50
    assert [lengths[pack].tolist() for pack in packs] == [[70, 30], [50, 25, 20]]


def test_best_fit_looks_beyond_a_full_pack_that_has_no_patches_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl_pipeline.data.packing.SIZE_NOISE", 0.0)
    lengths, patches = np.array([60, 50, 30]), np.array([90, 10, 20])
    packs = best_fit(lengths, patches, max_tokens=100, max_patches=100, rng=np.random.default_rng(0))
    assert packs == [[0], [1, 2]]


def test_first_fit_takes_the_first_pack_that_has_room() -> None:
    lengths = np.array([60, 50, 30, 40, 10, 20, 45])
    packs = first_fit(lengths, np.zeros(7), max_tokens=100, max_patches=None, rng=np.random.default_rng(5))
    expected: list[list[int]] = []
    for sample in np.random.default_rng(5).permutation(7).tolist():
        room = next((pack for pack in expected if lengths[pack].sum() + lengths[sample] <= 100), None)
        if room is None:
            room = []
            expected.append(room)
        room.append(sample)
    assert packs == expected


@pytest.mark.parametrize("packer", PACKERS)
def test_a_seed_decides_and_another_seed_packs_otherwise(packer) -> None:
    lengths = log_normal(500, 2048)

    def packed(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return packer(lengths, np.zeros_like(lengths), max_tokens=2048, max_patches=None, rng=rng)

    assert packed(1) == packed(1)
    together = [{frozenset(pack) for pack in packed(seed)} for seed in (1, 2)]
    assert len(together[0] & together[1]) < len(together[0]) / 2


def test_best_fit_of_100_000_samples_takes_seconds() -> None:
    lengths = log_normal(100_000, 16_384)
    start = time.process_time()
    best_fit(lengths, 4 * lengths, max_tokens=16_384, max_patches=40_000, rng=np.random.default_rng(0))
    assert time.process_time() - start < 5


def test_unpacked_samples_stand_alone_in_random_order() -> None:
    packs = one_each(np.arange(10, 60), group_by_length=False, group=4, rng=np.random.default_rng(0))
    assert sorted(packs) == [[sample] for sample in range(50)]
    assert packs != sorted(packs)


def test_grouped_samples_of_a_step_are_of_similar_length() -> None:
    lengths = np.random.default_rng(3).permutation(np.arange(100, 150))
    packs = one_each(lengths, group_by_length=True, group=8, rng=np.random.default_rng(0))
    order = [sample for [sample] in packs]
    assert sorted(order) == list(range(50))
    steps = [lengths[order[start : start + 8]] for start in range(0, 50, 8)]
    assert all(step.max() - step.min() < 8 for step in steps)
    assert len(steps[-1]) == 2
    firsts = [step.min() for step in steps[:-1]]
    assert firsts != sorted(firsts)

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_pipeline.data.plan.packing import Packs, balanced, best_fit, first_fit, one_each
from qvl_pipeline.data.plan.packing.best_fit_decreasing import SIZE_NOISE
from qvl_pipeline.tokens.work import llm_cost, vision_cost

PACKERS = [best_fit, first_fit, balanced]
SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 300)), max_size=60)


def arrays(samples: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths, patches = np.array(samples, dtype=np.int32).reshape(-1, 2).T
    return lengths, patches


def lists(packs: Packs) -> list[list[int]]:
    return [pack.tolist() for pack in packs]


def log_normal(count: int, max_tokens: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(6.5, 1.0, count), 16, max_tokens).astype(np.int32)


def images_and_text(count: int, max_patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and patches of which a third of the samples is text, as in a mixed data set."""
    rng = np.random.default_rng(0)
    patches = np.clip(rng.lognormal(7.0, 0.8, count), 64, max_patches).astype(np.int32) // 4 * 4
    patches[rng.random(count) < 0.3] = 0
    return np.clip(rng.lognormal(5.0, 1.0, count), 16, 2048).astype(np.int32) + patches // 4, patches


@pytest.mark.parametrize("packer", PACKERS)
@settings(max_examples=150, deadline=None)
@given(samples=SAMPLES, max_patches=st.none() | st.integers(300, 900), units=st.sampled_from([4, 4096]))
def test_every_sample_is_in_one_pack_and_no_budget_is_exceeded(packer, samples, max_patches, units) -> None:
    lengths, patches = arrays(samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qvl_pipeline.data.plan.packing.best_fit_decreasing.PATCH_UNITS", units)
        packs = packer(lengths, patches, max_tokens=100, max_patches=max_patches, rng=np.random.default_rng(0))
    assert sorted(packs.samples.tolist()) == list(range(len(samples)))
    assert len(packs) == len(lists(packs))
    for pack in packs:
        assert len(pack)
        assert lengths[pack].sum() <= 100
        assert max_patches is None or patches[pack].sum() <= max_patches


@pytest.mark.parametrize(("packer", "fill"), [(best_fit, 0.999), (first_fit, 0.99), (balanced, 0.985)])
def test_packs_are_full_on_log_normal_lengths(packer, fill: float) -> None:
    lengths = log_normal(20_000, 16_384)
    rng = np.random.default_rng(1)
    packs = packer(lengths, np.zeros_like(lengths), max_tokens=16_384, max_patches=None, rng=rng)
    assert lengths.sum() / (len(packs) * 16_384) >= fill


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("max_patches", [65_536, 32_768, 16_384])
def test_packs_are_full_where_vision_patches_are_the_scarcer_budget(packer, max_patches: int) -> None:
    lengths = log_normal(5_000, 16_384)
    patches = np.minimum(4 * lengths * (np.arange(len(lengths)) % 10 > 0), max_patches)
    rng = np.random.default_rng(1)
    packs = packer(lengths, patches, max_tokens=16_384, max_patches=max_patches, rng=rng)
    fewest = max(lengths.sum() / 16_384, patches.sum() / max_patches)
    assert len(packs) <= 1.05 * fewest + 1


def reference_best_fit(lengths: np.ndarray, patches: np.ndarray, max_tokens: int, max_patches: int) -> list[list[int]]:
    """Best fit, one sample after the other: fewest tokens left, then most patches left, then the oldest pack."""
    packs: list[list[int]] = []
    for sample in range(len(lengths)):
        left = [(max_tokens - lengths[p].sum(), p, max_patches - patches[p].sum()) for p in packs]
        rooms = [(t, -q, n) for n, (t, _, q) in enumerate(left) if t >= lengths[sample] and q >= patches[sample]]
        if rooms:
            packs[min(rooms)[2]].append(sample)
        else:
            packs.append([sample])
    return packs


@settings(max_examples=150, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=60),
    max_patches=st.integers(2, 7),
)
def test_best_fit_in_bulk_is_best_fit_one_by_one(samples: list[tuple[int, int]], max_patches: int) -> None:
    lengths, patches = arrays(samples)
    packs = best_fit(lengths, patches, max_tokens=20, max_patches=max_patches, rng=np.random.default_rng(0))
    # The order in which samples were placed: by size, each with a noise of its own, text last.
    rng, keys = np.random.default_rng(0), lengths * 100 + patches
    order = rng.permutation(len(keys))
    order = order[np.argsort(keys[order], kind="stable")]
    noisy = np.maximum(lengths / 20, patches / max_patches)[order] * rng.uniform(
        1 - SIZE_NOISE, 1 + SIZE_NOISE, len(keys)
    )
    if (patches / lengths).max() * 20 <= max_patches:  # patches never run out, so they do not count
        return
    placed = order[np.lexsort([-noisy, patches[order] == 0])].tolist()
    expected = reference_best_fit(lengths[placed], patches[placed], 20, max_patches)
    assert sorted(sorted(zip(lengths[p], patches[p], strict=True)) for p in packs) == sorted(
        sorted(zip(lengths[placed][p], patches[placed][p], strict=True)) for p in expected
    )


def test_samples_of_like_size_are_mixed() -> None:
    # Samples of one kind often have one length: packs of one kind alone would make steps that learn one thing each.
    lengths = np.repeat([22, 28, 42, 48], 250)
    packs = best_fit(lengths, np.zeros(1000), max_tokens=1000, max_patches=None, rng=np.random.default_rng(0))
    most = [np.bincount(lengths[pack]).max() / len(pack) for pack in packs]
    assert np.median(most) < 0.6


def test_best_fit_puts_the_largest_first_and_each_into_the_fullest_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl_pipeline.data.plan.packing.best_fit_decreasing.SIZE_NOISE", 0.0)
    lengths = np.array([50, 20, 70, 30, 25])
    packs = best_fit(lengths, np.zeros(5), max_tokens=100, max_patches=None, rng=np.random.default_rng(0))
    # 70 | 50 | 30 joins 70 (full) | 25 and 20 join 50
    assert [lengths[pack].tolist() for pack in packs] == [[70, 30], [50, 25, 20]]


def test_best_fit_looks_beyond_a_full_pack_that_has_no_patches_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl_pipeline.data.plan.packing.best_fit_decreasing.SIZE_NOISE", 0.0)
    lengths, patches = np.array([60, 50, 30]), np.array([90, 10, 20])
    packs = best_fit(lengths, patches, max_tokens=100, max_patches=100, rng=np.random.default_rng(0))
    assert lists(packs) == [[0], [1, 2]]


@settings(max_examples=100, deadline=None)
@given(samples=SAMPLES, max_patches=st.none() | st.integers(300, 900))
def test_first_fit_takes_the_first_pack_that_has_room(samples, max_patches) -> None:
    lengths, patches = arrays(samples)
    packs = first_fit(lengths, patches, max_tokens=100, max_patches=max_patches, rng=np.random.default_rng(5))
    expected: list[list[int]] = []
    for sample in np.random.default_rng(5).permutation(len(lengths)).tolist():
        for pack in [*expected, []]:
            together = [*pack, sample]
            if lengths[together].sum() <= 100 and (max_patches is None or patches[together].sum() <= max_patches):
                break
        if not pack:
            expected.append(pack)
        pack.append(sample)
    assert lists(packs) == expected


@pytest.mark.parametrize("max_patches", [None, 24_576])
def test_balanced_packs_are_of_more_equal_work(max_patches: int | None) -> None:
    lengths, patches = images_and_text(20_000, 16_384)
    work = llm_cost(lengths) + vision_cost(patches)
    spread = {}
    for packer in PACKERS:
        rng = np.random.default_rng(0)
        loads = packer(lengths, patches, max_tokens=8_192, max_patches=max_patches, rng=rng).sums(work)
        spread[packer] = loads.std() / loads.mean()
    assert spread[balanced] < 0.5 * min(spread[best_fit], spread[first_fit])


@pytest.mark.parametrize("packer", PACKERS)
def test_samples_that_fit_into_one_pack_are_in_one(packer) -> None:
    lengths, patches = np.full(30, 20), np.full(30, 1_000)
    assert len(packer(lengths, patches, max_tokens=1_024, max_patches=None, rng=np.random.default_rng(0))) == 1


def test_attention_makes_one_long_sample_more_work_than_many_short_ones() -> None:
    assert llm_cost(np.array([16_384]))[0] > 1.2 * llm_cost(np.full(16, 1024)).sum()


def test_grouped_samples_of_a_step_are_of_similar_length_in_every_epoch() -> None:
    lengths = log_normal(405, 4096)  # no multiple of a step
    rng = np.random.default_rng(0)
    order, groups = np.zeros(0, dtype=np.int64), []
    for _ in range(3):
        packs = one_each(lengths, group_by_length=True, group=8, rng=rng, begun=len(order))
        assert sorted(packs.samples) == list(range(405))
        order = np.concatenate([order, packs.samples])
        groups.append(lengths[order[: len(order) // 8 * 8]].reshape(-1, 8))
    padding = [1 - group.sum() / (8 * group.max(axis=1)).sum() for group in groups]
    assert max(padding) < 1.1 * padding[0]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_seed_decides_and_another_seed_packs_otherwise(packer) -> None:
    lengths = log_normal(500, 2048)

    def packed(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return lists(packer(lengths, np.zeros_like(lengths), max_tokens=2048, max_patches=None, rng=rng))

    assert packed(1) == packed(1)
    together = [{frozenset(pack) for pack in packed(seed)} for seed in (1, 2)]
    assert len(together[0] & together[1]) < len(together[0]) / 2


@pytest.mark.parametrize("packer", [best_fit, first_fit, balanced])
def test_ten_times_as_many_samples_do_not_take_a_hundred_times_as_long(packer) -> None:
    """Also where patches run out. How long it takes is measured in `benchmarks.packing`."""

    def seconds(samples: int) -> float:
        lengths, patches = images_and_text(samples, 40_000)
        start = time.process_time()
        packer(lengths, patches, max_tokens=16_384, max_patches=40_000, rng=np.random.default_rng(0))
        return time.process_time() - start

    assert seconds(100_000) < 40 * min(seconds(10_000) for _ in range(3))


def test_taking_packs_keeps_their_samples_together() -> None:
    packs = Packs(np.array([5, 1, 4, 2, 3, 0]), np.array([0, 2, 3, 6]))
    assert lists(packs.take(np.array([2, 0, 2]))) == [[2, 3, 0], [5, 1], [2, 3, 0]]
    assert packs.sums(np.arange(6, dtype=np.int32)).tolist() == [6, 4, 5]


def test_unpacked_samples_stand_alone_in_random_order() -> None:
    packs = lists(one_each(np.arange(10, 60), group_by_length=False, group=4, rng=np.random.default_rng(0)))
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

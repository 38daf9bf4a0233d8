"""How full packs are, how even, and what packing costs: `python -m benchmarks.packing [--samples N]`.

Three data sets are packed to 16,384 tokens: log-normal text; text, images and clips; and the same where vision patches
have a budget of their own that is about as scarce as the tokens, the hardest case. Every row is measured in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.report import report
from qvl_pipeline.data.plan.packing import Packs, balanced, best_fit, first_fit
from qvl_pipeline.engine.feed.stream_packing import PACK_WINDOW, fill_pack
from qvl_pipeline.tokens.work import work_of

MAX_TOKENS = 16_384
PATCH_BUDGETS = {"log_normal": None, "mixed": None, "mixed_two_budgets": 49_152}


def next_fit(
    lengths: np.ndarray, patches: np.ndarray, *, max_tokens: int, max_patches: int | None, rng: np.random.Generator
) -> Packs:
    """Pack in shuffled order and open a new pack whenever a sample does not fit: what other trainers call first fit."""
    order = rng.permutation(len(lengths))
    budget = int(patches.sum()) if max_patches is None else max_patches
    bounds, tokens, vision = [0], 0, 0
    for number, (length, cost) in enumerate(zip(lengths[order].tolist(), patches[order].tolist(), strict=True)):
        if tokens + length > max_tokens or vision + cost > budget:
            bounds.append(number)
            tokens = vision = 0
        tokens += length
        vision += cost
    return Packs(order, np.array([*bounds, len(order)]))


def streamed(
    lengths: np.ndarray,
    patches: np.ndarray,
    *,
    max_tokens: int,
    max_patches: int | None,
    rng: np.random.Generator,
    strategy: str,
) -> Packs:
    """Pack in shuffled order as a lane of a stream does, which sees a few samples at a time."""
    budget = 2**62 if max_patches is None else max_patches
    usual = float(work_of(lengths, patches).sum() / lengths.sum())
    order = rng.permutation(len(lengths))
    coming = iter(order.tolist())
    waiting: list[dict[str, int]] = []
    packed, bounds = [], [0]
    while True:
        for sample in islice(coming, PACK_WINDOW - len(waiting)):
            waiting.append({"number": sample, "length": int(lengths[sample]), "vit_patches": int(patches[sample])})
        if not waiting:
            return Packs(np.array(packed), np.array(bounds))
        taken = fill_pack(waiting, strategy=strategy, max_tokens=max_tokens, max_patches=budget, work_per_token=usual)
        packed += [waiting[place]["number"] for place in taken]
        bounds.append(len(packed))
        waiting = [sample for place, sample in enumerate(waiting) if place not in taken]


STRATEGIES: dict[str, Callable[..., Packs]] = {
    "best_fit": best_fit,
    "balanced": balanced,
    "first_fit": first_fit,
    "next_fit": next_fit,
    **{
        f"stream, {strategy}": partial(streamed, strategy=strategy)
        for strategy in ("best_fit", "first_fit", "balanced")
    },
}


def samples(data: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and patches of samples; three tenths of the mixed ones are text, half images, two tenths clips."""
    rng = np.random.default_rng(0)
    if data == "log_normal":
        lengths = np.clip(rng.lognormal(6.5, 1.0, count), 16, MAX_TOKENS).astype(np.int32)
        return lengths, np.zeros_like(lengths)
    kind = rng.random(count)
    image = np.clip(rng.lognormal(7.0, 0.8, count), 64, 16_384).astype(np.int32) // 4 * 4
    patches = np.where(kind < 0.3, 0, np.where(kind < 0.8, image, np.minimum(8 * image, 49_152))).astype(np.int32)
    text = np.clip(rng.lognormal(5.0, 1.0, count), 16, 4_096).astype(np.int32)
    return np.minimum(text + patches // 4, MAX_TOKENS), patches


def measure(strategy: str, data: str, count: int) -> dict[str, Any]:
    """Pack once, in this process.

    Returns:
        A row of the table. `fill` is the share of the scarcer budget that is used, `work_spread` the standard deviation
        of the work of a pack (language model with attention, and vision tower) over its mean.
    """
    lengths, patches = samples(data, count)
    budget = PATCH_BUDGETS[data]
    started = time.perf_counter()
    packs = STRATEGIES[strategy](
        lengths, patches, max_tokens=MAX_TOKENS, max_patches=budget, rng=np.random.default_rng(0)
    )
    elapsed = time.perf_counter() - started
    fewest = max(lengths.sum() / MAX_TOKENS, patches.sum() / budget if budget else 0)
    work = packs.sums(work_of(lengths, patches))
    return {
        "data": data,
        "samples": count,
        "strategy": strategy,
        "packs": len(packs),
        "fill": float(fewest / len(packs)),
        "work_spread": float(work.std() / work.mean()),
        "time_s": elapsed,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(count: int) -> None:
    """Measure every strategy on `count` samples of each data set, and `best_fit` on ten times as many."""
    jobs = [(strategy, data, count) for data in PATCH_BUDGETS for strategy in STRATEGIES]
    jobs += [("best_fit", data, 10 * count) for data in PATCH_BUDGETS]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as alone:
        rows = list(alone.map(measure, *zip(*jobs, strict=True)))
    found = {(row["strategy"], row["data"], row["samples"]): row for row in rows}
    ratios, targets = {}, {}
    for data in ("log_normal", "mixed"):
        ours, large = found["best_fit", data, count], found["best_fit", data, 10 * count]
        ratios |= {
            f"fill_{data}": ours["fill"],
            f"time_s_{data}": ours["time_s"],
            f"time_s_{data}_x10": large["time_s"],
            f"peak_memory_gib_{data}_x10": large["peak_memory_gib"],
            f"packs_of_next_fit_over_ours_{data}": found["next_fit", data, count]["packs"] / ours["packs"],
            f"work_spread_of_a_stream_{data}": found["stream, balanced", data, count]["work_spread"],
        }
        targets |= {
            f"fill_{data}": ">= 0.99",
            f"time_s_{data}": "<= 10",
            f"time_s_{data}_x10": "<= 150",
            f"peak_memory_gib_{data}_x10": "<= 4",
        }
    report("packing", rows, ratios=ratios, targets=targets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    main(parser.parse_args().samples)

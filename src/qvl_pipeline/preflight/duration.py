"""Hours and cost: FLOPs over the speed of the last training that is recorded for such a device, else of a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_pipeline.engine.model.flops import ModelFlops, peak_flops_by_name
from qvl_pipeline.preflight.hardware import Hardware
from qvl_pipeline.preflight.packs import Work

# Share of the peak that trainings of Qwen-VL reach: ours on one H200 are between 0.26 and 0.39 (benchmarks/results).
_USUAL_MFU = 0.30
# FLOPs a second of one process on a CPU, which no peak is known of: the order of magnitude only.
_USUAL_ON_A_CPU = 2e10
# Work of a step over that of a recorded one, beyond which the fixed cost of a step is no longer the same share of it.
_LIKE = (0.8, 1.25)


@dataclass(frozen=True)
class Duration:
    """How long the steps take.

    Attributes:
        seconds: Of all steps; starting, saving, evaluating and exporting come on top.
        rank_flops: FLOPs a second of a rank.
        mfu: Those over the peak of the device, where that is known.
        source: Where the speed is from.
    """

    seconds: float
    rank_flops: float
    mfu: float | None
    source: str


def total_flops(flops: ModelFlops, work: Work) -> float:
    """Add up the FLOPs of a whole training, all ranks together."""
    total = flops.per_patch * work.patches + flops.per_token * work.tokens + flops.per_target * work.targets
    total += flops.per_text_pair * work.pairs
    for grid, times in work.grids.items():
        pairs = flops.vision_pairs([grid])
        total += times * sum(cost * number for cost, number in zip(flops.per_vision_pair, pairs, strict=True))
    return total + sum(times * flops.of_sound(spectra) for spectra, times in work.sounds.items())


def duration_of(total: float, steps: int, hardware: Hardware, recorded: Iterable[Path], mfu: float) -> Duration:
    """Divide FLOPs by the speed of some hardware.

    Args:
        total: FLOPs of the training.
        steps: Its optimizer steps.
        hardware: Where it runs.
        recorded: Files `train_result.json` of earlier trainings, those to be preferred first.
        mfu: Share of the peak to take where none of them ran on such a device; 0 takes the usual one.
    """
    for path in recorded:
        if found := _recorded_speed(path, hardware):
            speed, of_step = found
            work = total / hardware.ranks / steps / of_step
            source = f"the recorded training of {path.parent.name}"
            if not _LIKE[0] <= work <= _LIKE[1]:
                source += f", whose steps had {1 / work:.1f} times the work: a rough guess"
            return _at(total, hardware, speed, source)
    if hardware.peak_flops:
        source = "preflight.mfu" if mfu else "the usual share of the peak, with no training recorded on this device"
        return _at(total, hardware, hardware.peak_flops * (mfu or _USUAL_MFU), source)
    return _at(total, hardware, _USUAL_ON_A_CPU, "a rough guess, with no training recorded on this device")


def _at(total: float, hardware: Hardware, rank_flops: float, source: str) -> Duration:
    share = rank_flops / hardware.peak_flops if hardware.peak_flops else None
    return Duration(total / hardware.ranks / rank_flops, rank_flops, share, source)


def _recorded_speed(path: Path, hardware: Hardware) -> tuple[float, float] | None:
    """FLOPs of a rank a second and a step of a training that ran on such devices; on CPUs, on as many processes."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    device = result.get("device", "")
    alike = device == hardware.name or (
        hardware.peak_flops is not None and peak_flops_by_name(device) == hardware.peak_flops
    )
    if hardware.device == "cpu":
        alike = device == "cpu" and result.get("world_size") == hardware.ranks
    metrics = path.with_name("training_metrics.csv")
    if not alike or not metrics.exists():
        return None
    rows = pd.read_csv(metrics)
    if not {"step", "tflops_per_rank", "tokens", "tokens_per_second"} <= set(rows.columns) or not len(rows):
        return None
    seconds = rows["tokens"] / rows["tokens_per_second"]
    computed = float((rows["tflops_per_rank"] * seconds).sum()) * 1e12
    return (computed / float(seconds.sum()), computed / int(rows["step"].iloc[-1])) if computed > 0 else None

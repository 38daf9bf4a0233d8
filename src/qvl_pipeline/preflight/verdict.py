"""The whole answer: verdict, memory, changes that make it fit, time, disk, kernels, versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from qvl_pipeline.config import BatchingConfig, ModelConfig, PreflightConfig
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.errors import UserError
from qvl_pipeline.preflight.advice import Change, changes, least_recomputation
from qvl_pipeline.preflight.duration import duration_of, total_flops
from qvl_pipeline.preflight.estimate import Estimate, estimate
from qvl_pipeline.preflight.hardware import GIB, Hardware, kernels_on, named_hardware, this_hardware
from qvl_pipeline.preflight.memory.model import config_of
from qvl_pipeline.preflight.packs import Heavy, Work, heaviest_allowed, heaviest_planned, work_of, work_of_steps
from qvl_pipeline.preflight.places import disk, host
from qvl_pipeline.preflight.versions import bad_versions
from qvl_pipeline.tokens.encoding import placeholder_ids

FITS, MAY_NOT_FIT, DOES_NOT_FIT = "fits", "may not fit", "does not fit"
# Nothing was asked, or nobody knows.
OFF, UNKNOWN = "off", "unknown"


@dataclass(frozen=True)
class Plan:
    """What is known of a plan; `None` where there is none, as before `tokenize` and of a stream."""

    packs: pd.DataFrame | None
    tokenized: Path | None
    frames: Path

    @property
    def there(self) -> bool:
        """Whether it has packs."""
        return self.packs is not None and len(self.packs) > 0


def look_ahead(
    spec: TrainSpec,
    model: ModelConfig,
    batching: BatchingConfig,
    preflight: PreflightConfig,
    plan: Plan,
    processes: tuple[int, int],
    recorded: Sequence[Path],
    *,
    automatic: bool,
) -> dict[str, Any]:
    """Answer what a training needs.

    Args:
        spec: The run.
        model: Parameters of its model.
        batching: Parameters of its packs.
        preflight: On what it is to run.
        plan: Its plan, if there is one.
        processes: Processes of each machine and machines, where `hardware` is `auto`.
        recorded: Files `train_result.json` of earlier trainings, those to be preferred first.
        automatic: Choose the least recomputation that fits (`gradient_checkpointing: auto`).

    Returns:
        The entry `preflight_report`.

    Raises:
        UserError: The model has not the parts that are named, or the hardware is not known.
    """
    named = preflight.hardware != "auto"
    hardware = named_hardware(preflight.hardware) if named else this_hardware(*processes)
    try:
        config = config_of(spec.model.path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the sizes of the model '{spec.model.path}' cannot be read here: {reason}") from error
    heaviest = _heaviest(spec, config, model, batching, plan, hardware)
    count = partial(_estimated, config=config, hardware=hardware, packs_per_step=batching.packs_per_step)
    spec, needed = least_recomputation(spec, heaviest, hardware, count) if automatic else (spec, count(spec, heaviest))
    verdict = FITS if needed.high <= hardware.memory else DOES_NOT_FIT if needed.low > hardware.memory else MAY_NOT_FIT
    smallest = [] if verdict == FITS else changes(spec, config, heaviest, hardware, needed, count)
    kernels, notes = kernels_on(hardware, spec)
    work = _work(plan, needed.heavy, batching, hardware, spec)
    return {
        "verdict": verdict,
        "sentence": _sentence(verdict, needed, hardware, smallest),
        "model": {"path": model.load_from_pretrained_path or f"tiny {model.processor_type}"}
        | {"parameters": needed.parameters, "trained_parameters": needed.trained},
        "hardware": asdict(hardware) | {"title": hardware.title, "ranks": hardware.ranks, "this_machine": not named},
        "memory": _memory(needed, hardware, plan),
        "recompute": asdict(spec.recompute),
        "changes": [_change(change, hardware) for change in smallest],
        "kernels": asdict(kernels) | {"notes": notes},
        "work": None
        if work is None
        else asdict(work) | {"grids": len(work.grids), "sounds": sum(work.sounds.values()), "of_the_plan": plan.there},
        "time": None if work is None else _time(work, needed, hardware, recorded, preflight),
        "disk": disk(spec, needed, work.steps if work else None, plan.frames),
        "host": host(spec, needed, hardware, 0 if plan.packs is None else len(plan.packs)),
        "versions": bad_versions(),
    }


def _estimated(
    spec: TrainSpec, heaviest: Sequence[Heavy], *, config: Any, hardware: Hardware, packs_per_step: int
) -> Estimate:
    try:
        return estimate(spec, config, heaviest, hardware, packs_per_step)
    except ValueError as error:
        raise UserError(str(error)) from error


def _heaviest(
    spec: TrainSpec, config: Any, model: ModelConfig, batching: BatchingConfig, plan: Plan, hardware: Hardware
) -> list[Heavy]:
    if plan.there and plan.tokenized is not None:
        ranks = max(1, hardware.ranks // spec.parallel.sp_ulysses_degree)
        return heaviest_planned(plan.packs, plan.tokenized, ranks, spec.data.per_device_train_batch_size)
    return heaviest_allowed(model, batching, placeholder_ids(config))


def _work(plan: Plan, heavy: Heavy, batching: BatchingConfig, hardware: Hardware, spec: TrainSpec) -> Work | None:
    if plan.there and plan.tokenized is not None:
        return work_of(plan.packs, plan.tokenized)
    if batching.max_steps > 0:  # the most that it can be
        return work_of_steps(heavy, batching.max_steps, batching.packs_per_step // batching.per_device_train_batch_size)
    return None


def _sentence(verdict: str, needed: Estimate, hardware: Hardware, smallest: Sequence[Change]) -> str:
    have, want = hardware.memory / GIB, needed.bytes / GIB
    figures = f"{want:,.1f} GiB of {have:,.1f} GiB a rank on {hardware.title}"
    if verdict == FITS:
        return f"{FITS} with {have - want:,.1f} GiB to spare: {figures}"
    text = f"{DOES_NOT_FIT}: {figures}, {want - have:,.1f} GiB too much"
    if verdict == MAY_NOT_FIT:
        band = f"{needed.low / GIB:,.1f} to {needed.high / GIB:,.1f}"
        text = f"{MAY_NOT_FIT}: {figures}, within the error of the estimate ({band} GiB)"
    if not smallest:
        return text
    last = smallest[-1]
    then = f"{last.estimate.bytes / GIB:,.1f} GiB"
    if not last.fits:
        return f"{text}; nor does it with all changes that are known here ({then}): use more GPUs"
    return f"{text}; it fits with {', then '.join(change.what for change in smallest)} ({then})"


def _memory(needed: Estimate, hardware: Hardware, plan: Plan) -> dict[str, Any]:
    return {
        "device_bytes": hardware.memory,
        "needed_bytes": needed.bytes,
        "low_bytes": needed.low,
        "high_bytes": needed.high,
        "spare_bytes": hardware.memory - needed.bytes,
        "tensors_bytes": needed.peak.bytes,
        "reserve_bytes": needed.reserve,
        "parts": needed.peak.parts,
        "moment": needed.peak.moment,
        "pack": {
            "what": needed.heavy.why,
            "of_the_plan": plan.there,
            "samples": len(needed.heavy.samples),
            "tokens": needed.heavy.tokens,
            "patches": needed.heavy.patches,
            "spectra": needed.heavy.spectra,
        },
    }


def _change(change: Change, hardware: Hardware) -> dict[str, Any]:
    return {
        "what": change.what,
        "parameters": change.parameters,
        "costs": change.costs,
        "needed_bytes": change.estimate.bytes,
        "spare_bytes": hardware.memory - change.estimate.bytes,
        "fits": change.fits,
    }


def _time(
    work: Work, needed: Estimate, hardware: Hardware, recorded: Sequence[Path], preflight: PreflightConfig
) -> dict[str, Any]:
    total = total_flops(needed.flops, work)
    duration = duration_of(total, work.steps, hardware, recorded, preflight.mfu)
    hours = duration.seconds / 3600
    return asdict(duration) | {
        "flops": total,
        "hours": hours,
        "gpu_hours": hours * hardware.ranks,
        "cost": hours * hardware.ranks * preflight.gpu_hour_price or None,
    }

"""Disk and host memory: checkpoints, frames and export against what is free; loaders and plan against what there is."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from qvl_pipeline.engine.feed.batch import PIECE_BYTES
from qvl_pipeline.engine.feed.batch_loader import items_ahead
from qvl_pipeline.engine.feed.loader_processes import OF_A_STREAM
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.preflight.estimate import Estimate
from qvl_pipeline.preflight.hardware import Hardware
from qvl_pipeline.training.space import checkpoints_at_once

_EXPORTED = {"bfloat16": 2, "float32": 4}
# Interpreter, torch and transformers of a training process, and of a loader process that is forked from it.
_PROCESS, _LOADER = 2 << 30, 300 << 20
# Bytes of a token in a batch: its id, four positions, its mask; and of a row of the plan.
_TOKEN, _PLAN_ROW = 8 * 5 + 1, 200


def disk(spec: TrainSpec, needed: Estimate, steps: int | None, frames: Path) -> dict[str, Any]:
    """Return what a training will write, what is there already, and what is free."""
    number = checkpoints_at_once(spec, steps)
    exported = needed.parameters * _EXPORTED[spec.export.dtype]
    folder = Path(spec.run.output_dir)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    written = number * needed.checkpoint + 2 * exported
    free = shutil.disk_usage(place).free
    return {
        "checkpoint_bytes": needed.checkpoint,
        "checkpoints": number,
        "export_bytes": exported,
        "needed_bytes": written,
        "frames_bytes": sum(file.stat().st_size for file in frames.rglob("*") if file.is_file()),
        "free_bytes": free,
        "enough": written <= free,
    }


def host(spec: TrainSpec, needed: Estimate, hardware: Hardware, packs: int) -> dict[str, Any]:
    """Return the memory that the processes of one machine need beside GPUs, and what this machine has."""
    batch = needed.heavy.tokens * _TOKEN + needed.heavy.patches * _patch_values(needed)
    workers = spec.data.dataloader_num_workers
    workers = OF_A_STREAM if workers == "auto" else workers  # how many it will be is measured when training starts
    loaders = batch
    if workers:
        ahead = items_ahead(math.ceil(batch / PIECE_BYTES), workers, spec.data.dataloader_prefetch_factor)
        loaders += workers * (_LOADER + ahead * min(batch, PIECE_BYTES))
    copied = needed.checkpoint // hardware.ranks if spec.run.save_async and hardware.device == "cuda" else 0
    rank = _PROCESS + loaders + packs * _PLAN_ROW + needed.offloaded + copied
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if hardware.device == "cpu":
        rank += needed.bytes
    return {
        "rank_bytes": rank,
        "loaders_bytes": loaders,
        "checkpoint_copy_bytes": copied,
        "offloaded_bytes": needed.offloaded,
        "needed_bytes": rank * hardware.per_node,
        "this_machine_bytes": total,
    }


def _patch_values(needed: Estimate) -> int:
    vision = needed.config.vision_config
    return 3 * vision.temporal_patch_size * vision.patch_size**2

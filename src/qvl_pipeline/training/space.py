"""The room on disk that a training needs for its checkpoints and its export, by the size of its model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from qvl_pipeline.engine.spec import TrainSpec

GIB = 1 << 30
# Bytes of optimizer state for each trained parameter: two float32 moments, two of 8 or 16 bits, or (of matrices) one.
_STATE_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2, "adamw_bf16": 4, "muon": 4}
_FLOAT32 = 4


def check_space(spec: TrainSpec, steps: int | None, model: nn.Module) -> None:
    """Refuse a training for which the disk has no room, before hours are spent on its way to the first checkpoint.

    Args:
        spec: The run; what an earlier leg of it left in its folder needs no room any more.
        steps: Optimizer steps of the run; `None` while that is not known.
        model: The model, its parameters frozen as in the run; needs no storage.

    Raises:
        UserError: Says how much is needed, of what, and how much is free.
    """
    checkpoint, number = checkpoint_bytes(spec, model), checkpoints_at_once(spec, steps)
    exported = _numbers(model) * {"bfloat16": 2, "float32": 4}[spec.export.dtype]
    kept = _kept_models(spec, steps)
    # The export is in the scratch folder and, for as long as it is copied, in its place too; kept models are linked.
    needed = number * checkpoint + (2 + kept) * exported
    folder = Path(spec.run.output_dir)
    left = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    also = f", {kept} kept ones of that size" if kept else ""
    if needed > free + left:
        raise UserError(
            f"the training needs about {(needed - left) / GIB:,.1f} GiB of disk ({number} checkpoints of "
            f"{checkpoint / GIB:,.1f} GiB, the exported model of {exported / GIB:,.1f} GiB and its copy{also}), but "
            f"{free / GIB:,.1f} GiB are free at {place}: free some, lower train.save_total_limit, "
            f"{'keep fewer checkpoints, ' if kept else ''}or set train.export_dtype: bf16"
        )


def checkpoint_bytes(spec: TrainSpec, model: nn.Module) -> int:
    """Bytes of a checkpoint: of what is trained, weights, the optimizer's state and the average."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = 2 if spec.optim.in_bfloat16 else _FLOAT32
    each = weights + _STATE_BYTES[spec.optim.optim] + (_FLOAT32 if spec.optim.ema_decay else 0)
    return each * trained


def checkpoints_at_once(spec: TrainSpec, steps: int | None) -> int:
    """Most checkpoints on disk: those kept, the one that is being written before the oldest goes, and the best."""
    run, best = spec.run, int(spec.validation.load_best_model_at_end)
    if not run.save_steps:
        return 1 + best
    saved = math.inf if steps is None else math.ceil(steps / run.save_steps)
    return int(min(run.save_total_limit + 1, saved)) + best


def _kept_models(spec: TrainSpec, steps: int | None) -> int:
    """Most models of steps on disk that are kept: the last is the export, and a former best goes late."""
    every = next((int(kind.partition(":")[2]) for kind in spec.export.keep_checkpoints if ":" in kind), 0)
    whole = not spec.adapter.used or spec.adapter.export != "adapter"
    return ((steps or 0) // every if every else 0) + 2 * ("best" in spec.export.keep_checkpoints) if whole else 0


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

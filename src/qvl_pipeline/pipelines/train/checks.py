"""What would fail in the first second of every rank, checked once before any of them starts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from qvl_pipeline.errors import UserError

if TYPE_CHECKING:
    from qvl_pipeline.engine.spec import TrainSpec


def check_before_launch(spec: TrainSpec, steps: int) -> None:
    """Run the engine's own checks of parts, rates and schedule on a model without weights.

    Args:
        spec: The run.
        steps: Optimizer steps of its plan.

    Raises:
        UserError: A name in `freeze_modules` or `learning_rates` fits nothing that is there and trained, the schedule
            is impossible, or a package is missing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from qvl_pipeline.engine.families import FAMILIES
    from qvl_pipeline.engine.freezing import freeze
    from qvl_pipeline.engine.optimization import learning_rate_schedule, peak_rates

    if spec.optim.optim == "adamw_8bit" and find_spec("torchao") is None:
        raise UserError(
            "optim 'adamw_8bit' needs the package torchao: install it (pip install torchao), or choose another"
        )
    family = FAMILIES[spec.model.family]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(spec.model.path))
    try:
        freeze(model, family, spec.model.freeze_modules)
        peak_rates(spec.optim, {family.group_of(name) for name, p in model.named_parameters() if p.requires_grad})
        learning_rate_schedule(spec.optim, steps)
    except ValueError as error:
        raise UserError(str(error)) from error

"""Trainer arguments as guides give them: all of them named `train.…`, where some are in `batching` here."""

from __future__ import annotations

import logging
from typing import Any

from qvl_pipeline.config import BatchingConfig, TrainConfig
from qvl_pipeline.errors import UserError

logger = logging.getLogger(__name__)


def with_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a command line with those of `train` that are in `batching` moved there.

    `max_steps` is one of transformers' `TrainingArguments`, and stands in a guide's `trainer_args:` beside the others;
    here it decides the plan.

    Args:
        params: Parameters by block, as `--params` gave them.

    Raises:
        UserError: It is given in both blocks, with two values.
    """
    train = params.get("train")
    moved = [key for key in train if key not in TrainConfig.model_fields] if isinstance(train, dict) else []
    moved = [key for key in moved if key in BatchingConfig.model_fields]
    if not moved:
        return params
    batching = dict(params.get("batching") or {})
    for key in moved:
        if batching.get(key, train[key]) != train[key]:
            raise UserError(
                f"--params has train.{key}={train[key]} and batching.{key}={batching[key]}: keep the second"
            )
        batching[key] = train[key]
        logger.info("train.%s is batching.%s here", key, key)
    kept = {key: value for key, value in train.items() if key not in moved}
    return {**params, "train": kept, "batching": batching}

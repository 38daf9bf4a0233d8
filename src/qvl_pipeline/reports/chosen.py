"""The parameters that matter: those that every reader asks for, and those that are not their defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from qvl_pipeline.config import BLOCKS

# Shown whatever their values.
ASKED_FOR = (
    *("train.learning_rate", "train.lr_scheduler_type", "train.warmup_ratio", "train.weight_decay", "train.optim"),
    *("train.freeze_modules", "train.seed", "batching.num_train_epochs", "batching.packing_length"),
    *("batching.gradient_accumulation_steps", "batching.data_parallel_size", "model.image_max_pixels"),
    *("sample.fps", "sample.video_max_frames", "sample.video_max_pixels", "adapter.type"),
)


class Chosen(NamedTuple):
    """A parameter of a training.

    Attributes:
        name: `block.key`.
        value: As in `parameters.yml`.
        default: Its default, where the value is another one.
    """

    name: str
    value: str
    default: str | None


def chosen_parameters(recorded: Mapping[str, Mapping[str, Any]]) -> list[Chosen]:
    """Choose what to show of the parameters that decided a training.

    Args:
        recorded: Values by block and key.

    Returns:
        Those in `ASKED_FOR`, in their order, then those that differ from their defaults.
    """
    found = {
        f"{block}.{key}": Chosen(f"{block}.{key}", _text(value), default_beside(block, key, value, values))
        for block, values in recorded.items()
        for key, value in values.items()
    }
    first = [found[name] for name in ASKED_FOR if name in found]
    return first + [row for name, row in found.items() if row.default is not None and name not in ASKED_FOR]


def default_beside(block: str, key: str, value: Any, values: Mapping[str, Any]) -> str | None:
    """Return the default of a parameter where `value`, one of the block's `values`, is another one."""
    field = BLOCKS[block].model_fields.get(key) if block in BLOCKS else None
    if field is None or field.is_required():
        return None
    default = to_jsonable_python(field.get_default(call_default_factory=True, validated_data=dict(values)))
    return None if default == value else _text(default)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)

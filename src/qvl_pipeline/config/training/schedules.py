"""The learning-rate schedules of `transformers.get_scheduler` and their arguments, known without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvl_pipeline.errors import did_you_mean

# Arguments beside warmup and training steps. A test holds this against the installed transformers.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
# Sets of which exactly one argument must be given.
_REQUIRED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
# Arguments with another limit than that no number may be negative: shares of the peak rate, and rates.
_SHARES = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")
_RATES = ("min_lr", "lr_end")
_NAMES = ("warmup_type", "decay_type")
_DEPEND_ON_LOSSES = ("reduce_lr_on_plateau", "greedy")


def check_schedule(name: str, kwargs: Mapping[str, Any], learning_rate: float) -> None:
    """Check that a schedule exists, and takes these arguments.

    What depends on the number of steps is checked before the launch, when there is a plan.

    Args:
        name: `lr_scheduler_type`.
        kwargs: `lr_scheduler_kwargs`.
        learning_rate: Peak rate.

    Raises:
        ValueError: It does not; the message says what to write instead.
    """
    if name in _DEPEND_ON_LOSSES:
        raise ValueError(
            f"lr_scheduler_type '{name}' depends on the losses seen so far, and here the rate is a function of the "
            "step alone, so that a resumed run equals an uninterrupted one: use cosine_with_min_lr"
        )
    if name not in SCHEDULES:
        hint = did_you_mean(name, SCHEDULES, f"known are {', '.join(SCHEDULES)}")
        raise ValueError(f"unknown lr_scheduler_type '{name}': {hint}")
    for key in kwargs:
        if key not in SCHEDULES[name]:
            known = ", ".join(SCHEDULES[name]) or "none"
            raise ValueError(f"lr_scheduler_kwargs: '{name}' has no argument '{key}'; it takes: {known}")
    choices = _REQUIRED.get(name, ())
    if choices and sum(key in kwargs for key in choices) != 1:
        raise ValueError(f"lr_scheduler_type '{name}' needs {' or '.join(choices)} in lr_scheduler_kwargs")
    for key, value in kwargs.items():
        if value is not None and key not in _NAMES:
            _check_number(key, value, learning_rate)


def _check_number(key: str, value: object, learning_rate: float) -> None:
    """Refuse what would let the rate fall below zero or rise above its peak: transformers takes it, and trains so."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"lr_scheduler_kwargs: {key} must be a number that is not negative, but is {value!r}")
    if key in _SHARES and value > 1:
        raise ValueError(
            f"lr_scheduler_kwargs: {key} {value:g} is a share of the peak rate: choose one between 0 and 1"
        )
    if key in _RATES and value > learning_rate:
        raise ValueError(
            f"lr_scheduler_kwargs: {key} {value:g} is above the peak it is to start or end below: choose at most "
            f"learning_rate {learning_rate:g}"
        )

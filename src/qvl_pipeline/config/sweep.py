"""What a sweep is: a file of its own, `kedro sweep FILE`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block


class Range(Block):
    """Values between two bounds, for `method: optuna`.

    Attributes:
        low: Lower bound.
        high: Upper bound.
        log: Whether small values are tried as often as large ones, by their orders of magnitude.
        step: Distance of values; `None` takes any number, or any whole one where both bounds are whole.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high {self.high}: low must be the smaller one")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a positive low, and has no step")
        return self


class Objective(Block):
    """What is sought: one of both.

    Attributes:
        minimize: `train/loss`, `train/eval_loss`, …: the lowest value of a column of `training_metrics.csv` (of `loss`,
            the last); or a number of `metrics.json`, such as `trained/overall/loss`.
        maximize: The same, such as `trained/overall/exact_match`.
    """

    minimize: str | None = None
    maximize: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Objective:
        if (self.minimize is None) == (self.maximize is None):
            raise ValueError("give one of minimize and maximize")
        return self

    @property
    def metric(self) -> str:
        """Name of what is sought."""
        return self.minimize or self.maximize or ""

    @property
    def sign(self) -> int:
        """1 where less is better, -1 where more is."""
        return 1 if self.minimize else -1


class Prune(Block):
    """Ending trials that are worse than half of those before, by `eval_loss` at the same step (median rule).

    Attributes:
        after_trials: Trials that are let be.
        after_steps: Optimizer steps that a trial is let be.
    """

    after_trials: int = Field(default=3, ge=1)
    after_steps: int = Field(default=0, ge=0)


class SweepConfig(Block):
    """A sweep.

    Attributes:
        name: Its name; by default that of the file.
        env: Profile whose parameters are varied.
        objective: What is sought.
        parameters: By its dotted name, such as `train.learning_rate`, a list of values or a range.
        method: `grid` tries all combinations of lists; `optuna` searches (TPE).
        trials: How many are tried, for `optuna`.
        prune: When a trial ends early; `None` never. It needs `train.eval_strategy`.
        parallel: Trials side by side; GPUs are shared out among them evenly.
        keep: Whether the models of all trials stay, or that of the best.
        seed: Seed of the search.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    env: str
    objective: Objective
    parameters: dict[str, list[Any] | Range] = Field(min_length=1)
    method: Literal["grid", "optuna"] = "grid"
    trials: int = Field(default=20, ge=1)
    prune: Prune | None = None
    parallel: int = Field(default=1, ge=1)
    keep: Literal["best", "all"] = "best"
    seed: int = 0

    @model_validator(mode="after")
    def _fits_the_method(self) -> SweepConfig:
        ranges = [name for name, values in self.parameters.items() if isinstance(values, Range)]
        if self.method == "grid" and ranges:
            raise ValueError(f"{ranges[0]} is a range, and a grid has values: list them, or set method to optuna")
        if self.method == "grid" and "trials" in self.model_fields_set:
            raise ValueError("a grid tries all combinations: leave out trials, or set method to optuna")
        if empty := [name for name, values in self.parameters.items() if values == []]:
            raise ValueError(f"{empty[0]} has no values")
        if short := [name for name in self.parameters if "." not in name]:
            raise ValueError(f"{short[0]} is no parameter: give its block too, such as train.learning_rate")
        return self

"""Which values are tried next, and which parameter mattered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qvl_pipeline.config.sweep import Range, SweepConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.sweeps.trial import Trial, Values

if TYPE_CHECKING:
    import optuna


class Search(Protocol):
    """A way to choose values."""

    def ask(self) -> Values | None:
        """Return the next values; `None` when there are no more."""

    def tell(self, trial: Trial) -> None:
        """Learn what came of a trial."""


class Grid:
    """All combinations of lists, the last parameter changing first."""

    def __init__(self, config: SweepConfig, known: Sequence[Trial]) -> None:
        """Leave out those that are known, also those that are to go on."""
        combinations = itertools.product(*config.parameters.values())
        points = [dict(zip(config.parameters, values, strict=True)) for values in combinations]
        tried = {trial.id for trial in known}
        self._left = [values for values in points if Trial(values).id not in tried]

    def ask(self) -> Values | None:
        """Return the next combination."""
        return self._left.pop(0) if self._left else None

    def tell(self, trial: Trial) -> None:
        """Take no notice."""


class Optuna:
    """Optuna's tree-structured Parzen estimator, which learns from all trials that are done."""

    def __init__(self, config: SweepConfig, known: Sequence[Trial]) -> None:
        """Make a study of the trials that are known.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise UserError("method 'optuna' needs optuna: `uv pip install optuna`, or set method to grid") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config, self._optuna = config, optuna
        sampler = optuna.samplers.TPESampler(seed=config.seed + len(known), n_startup_trials=min(4, config.trials))
        self.study = optuna.create_study(sampler=sampler, direction="minimize")
        self._space = {name: self._distribution(values) for name, values in config.parameters.items()}
        self._asked: dict[str, optuna.Trial | None] = {}
        self._left = config.trials - len(known)
        for trial in known:
            self._add(trial)

    def ask(self) -> Values | None:
        """Return the most promising values."""
        while self._left > 0:
            self._left -= 1
            asked = self.study.ask(self._space)
            values = dict(asked.params)
            if Trial(values).id not in self._asked:
                self._asked[Trial(values).id] = asked
                return values
        return None

    def tell(self, trial: Trial) -> None:
        """Tell the study what came of a trial."""
        states = self._optuna.trial.TrialState
        asked = self._asked[trial.id]
        if asked is None:  # begun before this study was made
            self._add(trial)
        elif trial.state == "done":
            self.study.tell(asked, self._config.objective.sign * trial.objective)
        else:
            self.study.tell(asked, state=states.PRUNED if trial.state == "pruned" else states.FAIL)

    def _add(self, trial: Trial) -> None:
        if trial.state == "done":
            value = self._config.objective.sign * trial.objective
            made = self._optuna.trial.create_trial(params=trial.values, distributions=self._space, value=value)
            self.study.add_trial(made)
        self._asked[trial.id] = None

    def _distribution(self, values: list[Any] | Range) -> optuna.distributions.BaseDistribution:
        kinds = self._optuna.distributions
        if isinstance(values, list):
            return kinds.CategoricalDistribution(values)
        if all(isinstance(bound, int) for bound in (values.low, values.high, values.step or 1)):
            return kinds.IntDistribution(values.low, values.high, log=values.log, step=values.step or 1)
        return kinds.FloatDistribution(float(values.low), float(values.high), log=values.log, step=values.step)


def is_hopeless(trial: Trial, others: Sequence[Trial], after_trials: int, after_steps: int) -> bool:
    """Say whether a trial is to end: its `eval_loss` is above the median of the others' at the same step.

    Args:
        trial: A trial that goes on.
        others: Those that are done.
        after_trials: How many there must be.
        after_steps: Steps that a trial is let be.
    """
    if not trial.reported or (step := max(trial.reported)) < after_steps:
        return False
    at_step = [min(loss for at, loss in other.reported.items() if at <= step) for other in others if _has(other, step)]
    return len(at_step) >= after_trials and min(trial.reported.values()) > float(np.median(at_step))


def _has(trial: Trial, step: int) -> bool:
    return trial.state == "done" and any(at <= step for at in trial.reported)


def importances(trials: Sequence[Trial]) -> dict[str, float]:
    """Return how much of the variance of the objective each parameter alone explains (η², the main effect).

    Values that are numbers in a range are put into four groups of equal size.

    Args:
        trials: Trials that are done.

    Returns:
        Share by the name of the parameter, the largest first; empty where all objectives are equal.
    """
    done = [trial for trial in trials if trial.state == "done"]
    objectives = np.array([trial.objective for trial in done], dtype=float)
    if len(done) < 2 or not (total := objectives.var()):
        return {}
    shares = {}
    for name in done[0].values:
        groups = _groups([trial.values[name] for trial in done])
        means = np.array([objectives[groups == group].mean() for group in groups])
        shares[name] = float(means.var() / total)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _groups(values: list[Any]) -> np.ndarray:
    different = {str(value) for value in values}
    if len(different) <= len(values) // 2 or not all(isinstance(value, int | float) for value in values):
        return np.array([str(value) for value in values])
    ranks = np.argsort(np.argsort(values))
    return ranks * min(4, max(2, len(values) // 2)) // len(values)

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvl_pipeline.config.sweep import SweepConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.sweeps.search import Grid, Optuna, importances, is_hopeless
from qvl_pipeline.sweeps.sweep import read_sweep
from qvl_pipeline.sweeps.trial import Trial

RATES = {"train.learning_rate": [0.1, 0.2, 0.3], "train.seed": [1, 2]}
RANGE = {"train.learning_rate": {"low": 1e-5, "high": 1.0, "log": True}, "train.seed": {"low": 1, "high": 3}}


def sweep(**values: Any) -> SweepConfig:
    given = {"name": "s", "env": "tiny", "objective": {"minimize": "train/loss"}, "parameters": RATES}
    return SweepConfig(**given | values)


def all_of(search: Grid | Optuna, objective: Any = lambda values: 0.0) -> list[Trial]:
    trials = []
    while values := search.ask():
        trials.append(Trial(values, "done", objective(values)))
        search.tell(trials[-1])
    return trials


def test_a_grid_is_all_combinations_and_goes_on_where_it_was() -> None:
    trials = all_of(Grid(sweep(), []))
    assert [tuple(trial.values.values()) for trial in trials] == [(r, s) for r in (0.1, 0.2, 0.3) for s in (1, 2)]
    assert [trial.values for trial in all_of(Grid(sweep(), trials[:4]))] == [trial.values for trial in trials[4:]]
    assert len({trial.id for trial in trials}) == 6


def test_optuna_finds_a_minimum_and_learns_from_trials_that_are_known() -> None:
    def loss(values: dict[str, Any]) -> float:
        return (math.log10(values["train.learning_rate"]) + 3) ** 2 + (values["train.seed"] != 2)

    config = sweep(method="optuna", trials=30, parameters=RANGE)
    trials = all_of(Optuna(config, []), loss)
    assert all(1e-5 <= trial.values["train.learning_rate"] <= 1 for trial in trials)
    assert {trial.values["train.seed"] for trial in trials} == {1, 2, 3}
    best = min(trials, key=lambda trial: trial.objective)
    assert best.objective < 0.3
    later = all_of(Optuna(config, trials[:20]), loss)
    assert len(later) == 10, "twenty of thirty were tried"
    begun = [*trials[:20], Trial({"train.learning_rate": 0.5, "train.seed": 1})]
    search = Optuna(config, begun)
    search.tell(Trial(begun[-1].values, "done", 9.0))
    assert len(all_of(search, loss)) == 9, "one of them was cut off, and is counted"
    mean = sum(trial.objective for trial in later) / 10
    assert mean < sum(trial.objective for trial in trials[:10]) / 10, "it does not begin anew"


def test_what_is_sought_may_be_the_highest() -> None:
    config = sweep(method="optuna", trials=25, parameters=RANGE, objective={"maximize": "trained/overall/anls"})
    trials = all_of(Optuna(config, []), lambda values: values["train.learning_rate"])
    assert max(trial.objective for trial in trials[10:]) > 0.3


def test_the_parameter_that_matters_is_told() -> None:
    rng = random.Random(0)
    trials = [
        Trial({"train.learning_rate": rng.random(), "train.seed": seed, "train.optim": kind}, "done")
        for seed in (1, 2)
        for kind in "ab"
        for _ in range(10)
    ]
    for trial in trials:
        trial.objective = 5 * trial.values["train.learning_rate"] + (trial.values["train.optim"] == "a")
    shares = importances(trials)
    assert list(shares) == ["train.learning_rate", "train.optim", "train.seed"]
    assert shares["train.learning_rate"] > 0.5 > shares["train.optim"] > shares["train.seed"]
    assert importances(trials[:1]) == {}


def test_a_trial_worse_than_half_of_the_others_is_hopeless() -> None:
    others = [Trial({"a.b": n}, "done", 0.0, {5: n + 1.0, 10: n + 0.0}) for n in range(4)]
    assert is_hopeless(Trial({}, reported={10: 1.6}), others, after_trials=3, after_steps=0)
    assert not is_hopeless(Trial({}, reported={10: 1.4}), others, after_trials=3, after_steps=0)
    assert not is_hopeless(Trial({}, reported={5: 2.4}), others, after_trials=3, after_steps=0)
    assert not is_hopeless(Trial({}, reported={10: 9.0}), others, after_trials=5, after_steps=0)
    assert not is_hopeless(Trial({}, reported={10: 9.0}), others, after_trials=3, after_steps=11)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"parameters": RANGE}, "a grid has values: list them, or set method to optuna"),
        ({"trials": 3}, "a grid tries all combinations"),
        ({"objective": {}}, "give one of minimize and maximize"),
        ({"objectiv": {}}, "unknown key 'objectiv': did you mean 'objective'"),
        ({"parameters": {"learning_rate": [1]}}, "learning_rate is no parameter: give its block too"),
        ({"method": "optuna", "parameters": {"train.seed": {"low": 3, "high": 1}}}, "low must be the smaller one"),
    ],
)
def test_a_file_that_is_no_sweep_is_said(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "rates.yml"
    given = {"env": "tiny", "objective": {"minimize": "train/loss"}, "parameters": RATES}
    file.write_text(yaml.safe_dump(given))
    assert read_sweep(file).name == "rates"
    file.write_text(yaml.safe_dump(given | changed))
    with pytest.raises(UserError, match=sentence):
        read_sweep(file)

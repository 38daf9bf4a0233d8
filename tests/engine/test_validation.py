"""Loss over the eval split during training: exact, without a trace in training, and the best checkpoint by it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine.checkpoints import completed
from qvl_pipeline.engine.spec import TrainSpec, ValidationSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.engine.validation import Validation
from tests.engine.ranks import run_ranks
from tests.engine.training import changed, make_training, trained


@pytest.fixture
def training(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    """Twelve samples in three steps; three of them are the eval split as well: text, image, text."""
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl")
    plan = pd.read_parquet(base.data.pack_plan)
    plan = plan.iloc[[0, 1, 3]].assign(step=0, pack=[0, 1, 2])
    plan.astype({"step": "int32", "pack": "int32"}).to_parquet(tmp_path / "eval_plan.parquet", index=False)
    validation = ValidationSpec(strategy="steps", steps=2, plan=str(tmp_path / "eval_plan.parquet"), load_best=False)
    return dataclasses.replace(base, validation=validation)


def _weights(training: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(training.export.output_dir) / "model.safetensors")


def _assert_same_weights(actual: TrainSpec, expected: TrainSpec) -> None:
    for name, weight in _weights(expected).items():
        assert torch.equal(_weights(actual)[name], weight), name


def test_loss_is_the_same_on_any_number_of_ranks(training: TrainSpec, tmp_path: Path) -> None:
    # Of 4 ranks, one has no pack at all.
    runs = [trained(changed(training, tmp_path / str(n)), nproc=n) for n in (1, 4)]
    for rows in runs:
        assert ["eval_loss" in row for row in rows] == [False, True, True]  # after step 2, and at the end
        for row, expected in zip(rows[1:], runs[0][1:], strict=True):
            assert row["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
            assert row["eval_loss_by_source"] == pytest.approx(expected["eval_loss_by_source"], rel=1e-5)
            assert row["eval_tokens"] == 2 + 3 + 5  # the answers of samples 0, 1 and 3


def test_loss_is_that_of_training_on_the_same_samples_with_the_same_weights(
    training: TrainSpec, tmp_path: Path
) -> None:
    frozen = changed(training, tmp_path / "run", optim={"learning_rate": 1e-12})
    shutil.copy(training.data.pack_plan, training.validation.plan)
    plan = pd.read_parquet(training.validation.plan)
    plan[plan["step"] == 2].assign(step=0).astype({"step": "int32"}).to_parquet(training.validation.plan, index=False)
    row = trained(frozen, nproc=2)[2]
    assert row["eval_loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert row["eval_loss_by_source"] == pytest.approx(row["loss_by_source"], rel=1e-6)


def test_training_is_bit_identical_with_and_without(training: TrainSpec, tmp_path: Path) -> None:
    def run(strategy: str, num_workers: int, *, reshard: bool) -> tuple[TrainSpec, list[dict[str, Any]]]:
        spec = changed(
            training,
            tmp_path / f"{strategy} {num_workers}",
            data={"num_workers": num_workers},
            parallel={"reshard_after_forward": reshard},
            validation={"strategy": strategy, "steps": 1},
        )
        return spec, trained(spec, nproc=2)

    # How batches are loaded and weights are kept changes nothing by itself, so one run without evaluation will do.
    plain, without = run("no", 0, reshard=True)
    for evaluated, with_ in (run("steps", 0, reshard=False), run("steps", 1, reshard=True)):
        assert all("eval_loss" in row for row in with_)
        assert [row["loss"] for row in with_] == [row["loss"] for row in without]
        assert [row["grad_norm"] for row in with_] == [row["grad_norm"] for row in without]
        _assert_same_weights(evaluated, plain)


def test_epoch_strategy_evaluates_after_each_pass(training: TrainSpec, tmp_path: Path) -> None:
    # Three steps make one and a half passes over the data: the first pass ends within step 2.
    spec = changed(training, tmp_path / "run", data={"epochs": 1.5}, validation={"strategy": "epoch", "steps": 0})
    assert ["eval_loss" in row for row in trained(spec, nproc=1)] == [False, True, True]


def test_best_checkpoint_is_kept_and_exported(training: TrainSpec, tmp_path: Path) -> None:
    # A learning rate so high that training gets worse after its first step.
    best = changed(
        training,
        tmp_path / "best",
        run={"save_steps": 1, "save_total_limit": 1},
        optim={"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0},
        validation={"strategy": "steps", "steps": 1, "load_best": True},
    )
    rows = trained(best, nproc=2)
    losses = [row["eval_loss"] for row in rows]
    best_step = 1 + losses.index(min(losses))
    assert best_step < 3, losses
    assert [step for step, _ in completed(Path(best.run.output_dir) / "checkpoints")] == [best_step, 3]
    assert json.loads((Path(best.run.output_dir) / "result.json").read_text())["exported_step"] == best_step
    again = changed(best, tmp_path / "again", validation={"load_best": False}, run={"save_total_limit": 3})
    trained(again, nproc=2)
    for step, path in completed(Path(again.run.output_dir) / "checkpoints"):
        if step > best_step:
            shutil.rmtree(path)
    assert not all(torch.equal(_weights(best)[name], weight) for name, weight in _weights(again).items())
    # What a run exports that ends at the best step.
    resumed = changed(best, tmp_path / "resumed")
    shutil.copytree(again.run.output_dir, resumed.run.output_dir)
    trained(resumed, nproc=2)
    assert json.loads((Path(resumed.run.output_dir) / "result.json").read_text())["resumed_from_step"] == best_step
    _assert_same_weights(resumed, best)


def main_asked_to_stop(spec_path: Path, where: str, at: int) -> int:
    """Train; SIGTERM comes in a step, or in an evaluation. Notes which checkpoints there were at each evaluation."""
    folder = spec_path.parent
    take_step, evaluate = Trainer._train_step, Validation.run

    def step(self: Trainer, step: Any, *args: Any) -> torch.Tensor:
        if (where, at) == ("step", step.number):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, step, *args)

    def evaluation(self: Validation, model: Any, step: int) -> dict[str, Any]:
        saved = [number for number, _ in completed(folder / "checkpoints")]
        with (folder / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps([step, saved]) + "\n")
        if (where, at) == ("evaluation", step):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, model, step)

    Trainer._train_step, Validation.run = step, evaluation
    return engine.main(spec_path)


def test_a_stop_saves_before_it_evaluates_and_the_rows_are_those_of_an_undisturbed_run(
    training: TrainSpec, tmp_path: Path
) -> None:
    whole = changed(
        training,
        tmp_path / "whole",
        optim={"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0},
        validation={"strategy": "steps", "steps": 1, "load_best": True},
    )
    expected = trained(whole, nproc=1)
    stopped = changed(whole, tmp_path / "stopped")
    folder = Path(stopped.run.output_dir)
    folder.mkdir()
    stopped.save(folder / "train_spec.json")
    legs = [
        # Where the stop is asked for; the step that it comes after, and the rows there are then.
        ("evaluation", 1, 1, [1]),
        ("step", 2, 2, [1]),
        ("evaluation", 2, 2, [1, 2]),  # the one that was left
    ]
    for where, at, step, rows in legs:
        run_ranks(main_asked_to_stop, 1, folder / "train_spec.json", where, at, log_dir=folder / "logs")
        assert json.loads((folder / "stopped.json").read_text()) == {"step": step}
        assert completed(folder / "checkpoints")[-1][0] == step
        assert [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()] == rows
        (folder / "stopped.json").unlink()
    run_ranks(main_asked_to_stop, 1, folder / "train_spec.json", "step", 3, log_dir=folder / "logs")
    assert not (folder / "stopped.json").exists()  # asked in the last step, it went on to the end
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [step for step, _ in evaluations] == [1, 2, 3]
    assert [step in saved for step, saved in evaluations] == [False, True, True]
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key in ("step", "epoch", "loss", "grad_norm", "tokens", "eval_loss", "eval_loss_by_source", "eval_tokens"):
            assert row[key] == other[key]
    results = [json.loads((path / "result.json").read_text()) for path in (folder, tmp_path / "whole")]
    assert results[0]["exported_step"] == results[1]["exported_step"]
    _assert_same_weights(stopped, whole)
    assert not (folder / "postponed.json").exists()

"""Loss over the eval split during training: exact, without a trace in training, and the best checkpoint by it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from qvl_pipeline.engine import __main__ as engine
from qvl_pipeline.engine.run.checkpoint_files import completed
from qvl_pipeline.engine.run.validation import Validation
from qvl_pipeline.engine.spec import TrainSpec, ValidationSpec
from qvl_pipeline.engine.trainer import Trainer
from tests.engine.ranks import JobFailedError, run_ranks
from tests.engine.training import changed, main_that_hangs, make_training, trained


@pytest.fixture
def training(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> TrainSpec:
    """Twelve samples in three steps; three of them are the eval split as well: text, image, text."""
    base = make_training(tmp_path / "data", tiny_folders("qwen3_vl"), "qwen3_vl")
    plan = pd.read_parquet(base.data.pack_plan)
    plan = plan.iloc[[0, 1, 3]].assign(step=0, pack=[0, 1, 2])
    plan.astype({"step": "int32", "pack": "int32"}).to_parquet(tmp_path / "eval_plan.parquet", index=False)
    validation = ValidationSpec("steps", 2, str(tmp_path / "eval_plan.parquet"), load_best_model_at_end=False)
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
            data={"dataloader_num_workers": num_workers},
            parallel={"reshard_after_forward": reshard},
            validation={"eval_strategy": strategy, "eval_steps": 1},
        )
        return spec, trained(spec, nproc=2)

    # How batches are loaded and weights are kept changes nothing by itself, so one run without evaluation will do.
    plain, without = run("no", 0, reshard=True)
    for evaluated, with_ in (run("steps", 0, reshard=False), run("steps", 1, reshard=True)):
        assert all("eval_loss" in row for row in with_)
        assert [row["loss"] for row in with_] == [row["loss"] for row in without]
        assert [row["grad_norm"] for row in with_] == [row["grad_norm"] for row in without]
        _assert_same_weights(evaluated, plain)


def test_epoch_strategy_evaluates_after_each_pass_in_time_that_is_not_that_of_training(
    training: TrainSpec, tmp_path: Path
) -> None:
    # Three steps make one and a half passes over the data: the first pass ends within step 2.
    spec = changed(
        training, tmp_path / "run", data={"epochs": 1.5}, validation={"eval_strategy": "epoch", "eval_steps": 0}
    )
    rows = trained(spec, nproc=1)
    assert ["eval_loss" in row for row in rows] == [False, True, True]
    # Between the rows of steps 2 and 3 are that evaluation and one step.
    assert rows[2]["time"] - rows[1]["time"] >= rows[1]["eval_time_s"] + rows[2]["step_time_s"]


def test_eval_sample_whose_decoding_hangs_is_named_by_the_watchdog(training: TrainSpec, tmp_path: Path) -> None:
    plan = pd.read_parquet(training.data.pack_plan)
    plan[plan["step"] != 1].replace({"step": {2: 1}}).to_parquet(training.data.pack_plan, index=False)
    others = plan[plan["step"] == 1].assign(step=0, pack=range(4))
    others.astype({"step": "int32", "pack": "int32"}).to_parquet(training.validation.plan, index=False)
    hanging = changed(training, tmp_path / "run", run={"step_timeout_s": 3.0})
    with pytest.raises(JobFailedError):
        trained(hanging, nproc=1, timeout_s=60, main=partial(main_that_hangs, "7.png"))
    [report] = [json.loads(path.read_text()) for path in (tmp_path / "run" / "errors").glob("rank*.json")]
    assert (report["type"], report["sample_ids"]) == ("StepTimeoutError", ["b/7"])
    assert "still waits for its next batch of the evaluation" in report["message"]


def test_best_checkpoint_is_kept_and_exported(training: TrainSpec, tmp_path: Path) -> None:
    # A learning rate so high that training gets worse after its first step.
    best = changed(
        training,
        tmp_path / "best",
        run={"save_steps": 1, "save_total_limit": 1},
        optim={"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0},
        validation={"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
    )
    rows = trained(best, nproc=2)
    losses = [row["eval_loss"] for row in rows]
    best_step = 1 + losses.index(min(losses))
    assert best_step == 1, losses
    assert [step for step, _ in completed(Path(best.run.output_dir) / "checkpoints")] == [best_step, 2, 3], (
        "and the two newest"
    )
    assert json.loads((Path(best.run.output_dir) / "result.json").read_text())["exported_step"] == best_step
    again = changed(best, tmp_path / "again", validation={"load_best_model_at_end": False}, run={"save_total_limit": 3})
    trained(again, nproc=2)
    shutil.rmtree(Path(again.run.output_dir) / "checkpoints" / "checkpoint-3")
    assert not all(torch.equal(_weights(best)[name], weight) for name, weight in _weights(again).items())
    # Resumed after a step that is not the best: the next save, published before anything else, must not delete it.
    resumed = changed(best, tmp_path / "resumed", run={"save_async": False})
    shutil.copytree(again.run.output_dir, resumed.run.output_dir)
    trained(resumed, nproc=2)
    assert json.loads((Path(resumed.run.output_dir) / "result.json").read_text())["resumed_from_step"] == 2
    _assert_same_weights(resumed, best)


def _eval_plan(training: TrainSpec, name: str, rows: list[int]) -> dict[str, Any]:
    """An eval plan of these samples, a pack each."""
    path = Path(training.validation.plan).with_name(f"{name}.parquet")
    plan = pd.read_parquet(training.data.pack_plan).iloc[rows].assign(step=0, pack=range(len(rows)))
    plan.astype({"step": "int32", "pack": "int32"}).to_parquet(path, index=False)
    return {"plan": str(path), "eval_steps": 1}


def test_a_bad_sample_is_left_out_of_the_loss_or_ends_the_run(training: TrainSpec, tmp_path: Path) -> None:
    (tmp_path / "data" / "4.png").write_bytes(b"no longer an image")  # on rank 1, and trained on in the second step
    skipping = {"on_bad_sample": "skip"}
    bad = changed(training, tmp_path / "bad", data=skipping, validation=_eval_plan(training, "bad", [0, 4, 3]))
    rest = changed(training, tmp_path / "rest", data=skipping, validation=_eval_plan(training, "rest", [0, 3]))
    rows, expected = trained(bad, nproc=2), trained(rest, nproc=1)
    for row, other in zip(rows, expected, strict=True):
        assert (row["eval_skipped_samples"], other["eval_skipped_samples"]) == (1, 0)
        assert row["skipped_samples"] == other["skipped_samples"] == int(row["step"] == 2)
        for key in ("eval_loss", "loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)
        assert row["eval_tokens"] == other["eval_tokens"] == 2 + 5
    named = [json.loads(line) for line in (tmp_path / "bad" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in named] == [(1, "eval"), (2, "train"), (2, "eval"), (3, "eval")]
    assert {row["sample_id"] for row in named} == {"a/4"}
    assert json.loads((tmp_path / "bad" / "result.json").read_text())["skipped_samples"] == 1
    raising = changed(bad, tmp_path / "raising", data={"on_bad_sample": "raise"})
    with pytest.raises(JobFailedError, match="sample 'a/4': image '"):
        trained(raising, nproc=1)


def test_without_a_sample_left_there_is_no_best_and_the_last_weights_are_exported(
    training: TrainSpec, tmp_path: Path
) -> None:
    (tmp_path / "data" / "4.png").write_bytes(b"no longer an image")
    validation = _eval_plan(training, "bad", [4]) | {"load_best_model_at_end": True}
    spec = changed(training, tmp_path / "run", data={"on_bad_sample": "skip"}, validation=validation)
    rows = trained(spec, nproc=1)
    assert [(row["eval_loss"], row["eval_tokens"]) for row in rows] == [(None, 0)] * 3
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exported_step"] == 3
    assert "no evaluation had a sample left" in (tmp_path / "run" / "logs" / "rank0.log").read_text()


def main_asked_to_stop(spec_path: Path, where: str, at: int) -> int:
    """Train; SIGTERM comes in a step, or in an evaluation. Notes which checkpoints there were at each evaluation."""
    folder = spec_path.parent
    take_step, evaluate = Trainer._train_step, Validation.run

    def step(self: Trainer, step: Any, *args: Any) -> torch.Tensor:
        if (where, at) == ("step", step.number):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, step, *args)

    def evaluation(self: Validation, model: Any, step: int, *args: Any) -> dict[str, Any]:
        saved = [number for number, _ in completed(folder / "checkpoints")]
        with (folder / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps([step, saved]) + "\n")
        if (where, at) == ("evaluation", step):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, model, step, *args)

    Trainer._train_step, Validation.run = step, evaluation
    return engine.main(spec_path)


def test_a_stop_saves_before_it_evaluates_and_the_rows_are_those_of_an_undisturbed_run(
    training: TrainSpec, tmp_path: Path
) -> None:
    whole = changed(
        training,
        tmp_path / "whole",
        optim={"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0},
        validation={"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
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


def test_a_resumed_run_knows_the_best_step_that_is_saved_and_the_row_that_waits(
    training: TrainSpec, tmp_path: Path
) -> None:
    folder = Path(training.run.output_dir)
    for step in (1, 2, 4, 5):
        (folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"checkpoint-{step}" / "COMPLETE").touch()
    (folder / "checkpoints" / "checkpoint-4" / "COMPLETE").unlink()  # as if the run had been killed while it wrote
    losses = {1: 3.0, 2: 2.0, 3: 1.0, 4: 1.5, 5: None, 6: 2.5}
    rows = [{"step": step, "eval_loss": loss} for step, loss in losses.items()] + [{"step": 7}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def resumed(done: int) -> Validation:
        alone = {"dp": SimpleNamespace(get_local_rank=lambda: 0, size=lambda: 1)}
        validation = Validation(training, None, alone, torch.device("cpu"), None, None)
        validation.resume(folder, done)
        return validation

    assert resumed(7).best_step == 2
    (folder / "postponed.json").write_text('{"step": 8}\n')
    assert resumed(7).postponed is None
    assert resumed(8).postponed == {"step": 8}
    with (folder / "metrics.jsonl").open("a") as file:  # killed after the row was complete
        file.write('{"step": 8, "eval_loss": 1.0}\n')
    assert resumed(8).postponed is None

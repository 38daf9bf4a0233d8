"""Starting from the checkpoint of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl_pipeline.config import AdapterConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.training.identity import checkpoint_to_start_from, run_fingerprint, run_identity

MODEL = ModelConfig(processor_type="qwen3_vl")
SUMMARY = {"fingerprint": "abc"}


def identity(plan: str = "abc", base_model: str = "sha:1", **train: object) -> dict[str, str]:
    return run_identity(base_model, MODEL, TrainConfig(**train), plan)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint-5"
    path.mkdir()
    marker = {"step": 5, "world_size": 8, "identity": identity(freeze_modules=["visual"])}
    (path / "COMPLETE").write_text(json.dumps(marker))
    return path


def test_rates_schedule_precision_and_processes_may_differ(checkpoint: Path) -> None:
    others = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "bf16": True, "nproc_per_node": 3}
    train = TrainConfig(resume_from_checkpoint=str(checkpoint), freeze_modules=["visual"], **others)
    assert checkpoint_to_start_from(train, identity(freeze_modules=["visual"], **others)) == str(checkpoint)


@pytest.mark.parametrize(
    ("train", "plan", "sentence"),
    [
        ({"freeze_modules": ["visual"]}, "abd", r"\(plan: abc there, abd here\)"),
        ({}, "abc", r"\(train.freeze_modules: visual there, none here\)"),
        ({"freeze_modules": ["visual"], "optim": "muon"}, "abc", r"\(train.optim: adamw_torch there, muon here\)"),
    ],
)
def test_checkpoint_of_a_run_of_another_kind_is_refused(
    train: dict, plan: str, sentence: str, checkpoint: Path
) -> None:
    config = TrainConfig(resume_from_checkpoint=str(checkpoint), **train)
    with pytest.raises(UserError, match=sentence):
        checkpoint_to_start_from(config, identity(plan, **train))


def test_an_adapter_and_a_checkpoint_without_it_do_not_go_together(checkpoint: Path) -> None:
    config = TrainConfig(resume_from_checkpoint=str(checkpoint), freeze_modules=["visual"])
    lora = run_identity("sha:1", MODEL, config, "abc", AdapterConfig(type="lora"))
    with pytest.raises(UserError, match=r"\(adapter: None there, {.*\"type\": \"lora\"} here\)"):
        checkpoint_to_start_from(config, lora)
    (checkpoint / "COMPLETE").write_text(json.dumps({"step": 5, "world_size": 8, "identity": lora}))
    assert checkpoint_to_start_from(config, lora) == str(checkpoint)
    with pytest.raises(UserError, match=r"\(adapter: {.*} there, None here\)"):
        checkpoint_to_start_from(config, identity(freeze_modules=["visual"]))
    other = run_identity("sha:1", MODEL, config, "abc", AdapterConfig(type="lora", targets={"llm": ["mlp"]}))
    with pytest.raises(UserError, match="of another kind"):
        checkpoint_to_start_from(config, other)
    quantized = run_identity("sha:1", MODEL, config, "abc", AdapterConfig(type="lora", quantize_base="nf4"))
    with pytest.raises(UserError, match=r"{.*\"quantize_base\": \"nf4\".*} here"):
        checkpoint_to_start_from(config, quantized)


def test_checkpoint_that_is_not_there_or_not_whole_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .*checkpoint-9 does not exist"):
        checkpoint_to_start_from(TrainConfig(resume_from_checkpoint=str(tmp_path / "checkpoint-9")), {})
    with pytest.raises(UserError, match=r"is not a complete checkpoint .* complete ones here: checkpoint-5"):
        checkpoint_to_start_from(TrainConfig(resume_from_checkpoint=str(tmp_path)), {})


def test_a_run_from_a_checkpoint_has_checkpoints_of_its_own() -> None:
    auto, none, path = (
        run_fingerprint(SampleConfig(), MODEL, TrainConfig(resume_from_checkpoint=value), SUMMARY, [])
        for value in ("auto", "none", "p")
    )
    assert auto == none != path


def test_evaluations_count_where_they_choose_what_is_exported() -> None:
    def fingerprint(**train: object) -> str:
        return run_fingerprint(SampleConfig(), MODEL, TrainConfig(**train), SUMMARY, [])

    every_step, every_other = ({"eval_strategy": "steps", "eval_steps": steps} for steps in (1, 2))
    assert fingerprint(**every_step) == fingerprint(**every_other) == fingerprint()
    best = {"load_best_model_at_end": True}
    assert len({fingerprint(**every_step, **best), fingerprint(**every_other, **best), fingerprint()}) == 3

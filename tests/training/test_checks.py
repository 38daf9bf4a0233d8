"""Parameters that fit the model in no way are refused before any process starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvl_pipeline.demo.tiny_model import build_tiny_model
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.errors import UserError
from qvl_pipeline.training import checks
from tests.engine.training import changed, make_training


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    folder = tmp_path_factory.mktemp("checks")
    build_tiny_model(folder / "model", family="qwen2_5_vl", seed=0, corpus=["which digit is this?"])
    return make_training(folder / "data", folder / "model", "qwen2_5_vl", kinds=("text",))


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"model": {"freeze_modules": ("visaul",)}}, "freeze_modules: 'visaul' matches no parameter of qwen2_5_vl"),
        ({"model": {"freeze_modules": ("deepstack",)}}, "'deepstack' matches no parameter"),
        ({"model": {"freeze_modules": ("visual", "llm", "embed")}}, "leaves nothing to train"),
        (
            {"model": {"freeze_modules": ("vit",)}, "optim": {"learning_rates": {"vit": 1e-6}}},
            "learning_rates: 'vit' has no trained parameters in this run, which trains embed, llm, merger",
        ),
        (
            {"optim": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}},
            r"lr_scheduler_type 'polynomial' over 10 steps .* is impossible: lr_end \(1.0\) must be smaller",
        ),
        (
            {"optim": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 200}}},
            r"'warmup_stable_decay' takes 20\d steps .* but the run has 10: shorten them to 10 steps together",
        ),
        (
            {"parallel": {"transformer_layer_cls_to_wrap": ("Qwen3VLTextDecoderLayer",)}},
            "no module of qwen2_5_vl has the class 'Qwen3VLTextDecoderLayer'; its layers are Qwen2_5_VLDecoderLayer",
        ),
        ({"parallel": {"hsdp_shard_size": 3}}, "hsdp_shard_size 3 does not divide the 4 ranks"),
        ({"parallel": {"fp16": True}}, "fp16 needs a GPU"),
        ({"parallel": {"sp_ulysses_degree": 8}}, "8 does not divide the model's 4 attention heads"),
        ({"model": {"attn_implementation": "flash_attention_2"}}, "'flash_attention_2' needs the package|runs on CUDA"),
        (
            {"model": dict.fromkeys(("attn_implementation", "vit_attn_implementation"), "flash_attention_3")},
            "^attn_implementation 'flash_attention_3'",
        ),
        ({"model": {"vit_attn_implementation": "torch_varlen"}}, "vit_attn_implementation 'torch_varlen' runs on CUDA"),
        ({"model": {"attn_implementation": "torch_varlen"}, "data": {"use_rmpad": False}}, "knows no padding"),
        (
            {"stream": {"max_steps": 9}, "validation": {"eval_strategy": "epoch"}},
            "'epoch' needs a plan, .*: use 'steps'",
        ),
        ({"run": {"profile_steps": (11, 12)}}, r"profile_steps \[11, 12\] begin after the last step of the plan, 10"),
        (
            {"model": {"torch_compile": True, "torch_compile_backend": "inducter"}},
            "torch_compile_backend 'inducter' is not there: did you mean 'inductor'",
        ),
        ({"optim": {"optim": "adamw_8bit"}}, "needs the package torchao: install it"),
        ({"optim": {"optim": "adamw_bf16"}}, "'adamw_bf16' needs the package torchao: install it"),
        (
            {"parallel": {"frozen_sharding": "replicated"}},
            "'replicated' is for frozen weights, and this run trains all",
        ),
        ({"optim": {"warmup_steps": 11}}, "warmup_steps is 11, but there are 10 steps: the learning rate would never"),
    ],
)
def test_refused_in_one_sentence(
    groups: dict[str, dict[str, Any]],
    sentence: str,
    training: TrainSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=sentence) as caught:
        checks.check_before_launch(changed(training, tmp_path, **groups), steps=10, ranks=4)
    assert "\n" not in str(caught.value)


def test_a_warmup_as_long_as_the_training_is_possible(training: TrainSpec, tmp_path: Path) -> None:
    checks.check_before_launch(changed(training, tmp_path, optim={"warmup_steps": 10}), steps=10, ranks=1)


def test_kernels_that_a_cpu_has_not_are_warned_of(
    training: TrainSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checks.check_before_launch(changed(training, tmp_path, model={"use_liger_kernel": True}), steps=10, ranks=1)
    assert caplog.messages == ["use_liger_kernel is not used: Liger's kernels need CUDA, and this is cpu"]


def test_an_optimizer_that_cannot_be_saved_in_the_background_is_warned_of(
    training: TrainSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optim = {"optim": "adamw_8bit", "warmup_steps": 0}
    for save_async in (False, True):
        spec = changed(training, tmp_path, optim=optim, run={"save_async": save_async})
        assert caplog.messages == []
        checks.check_before_launch(spec, steps=10, ranks=1)
    assert caplog.messages == [
        "save_async is not used: the state of optim 'adamw_8bit' cannot be copied aside, so training waits until a "
        "checkpoint is written"
    ]


@pytest.mark.parametrize(
    ("parallel", "ranks", "sentence"),
    [
        ({"sp_ulysses_degree": 4}, 2, "sp_ulysses_degree 4 does not divide the number of processes, 2"),
        ({"sp_ulysses_degree": 2}, 3, "sp_ulysses_degree 2 does not divide the number of processes, 3"),
        ({"sp_ulysses_degree": 2, "hsdp_shard_size": 4}, 2, "hsdp_shard_size 4 does not divide the 2 ranks"),
    ],
)
def test_more_ways_to_share_than_processes_is_refused(
    parallel: dict[str, Any], ranks: int, sentence: str, training: TrainSpec, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        checks.check_before_launch(changed(training, tmp_path, parallel=parallel), steps=10, ranks=ranks)


def test_what_fits_passes(training: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    groups = {
        "model": {"vit_attn_implementation": "eager", "freeze_modules": ("visual", "model.language_model.layers.0.*")},
        "optim": {"learning_rates": {"llm": 1e-4}, "optim": "muon"},
        "parallel": {
            "transformer_layer_cls_to_wrap": ("Qwen2_5_VLDecoderLayer", "Qwen2MLP"),
            "hsdp_shard_size": 2,
            "sp_ulysses_degree": 4,
        },
    }
    kernels = checks.check_before_launch(changed(training, tmp_path, **groups), steps=10, ranks=4)
    assert kernels == "sdpa in the language model, eager in the vision tower"


def test_kernels_of_experts_and_of_linear_attention_are_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    build_tiny_model(tmp_path / "model", family="qwen3_5_moe", seed=0, corpus=["which digit is this?"])
    training = make_training(tmp_path / "data", tmp_path / "model", "qwen3_5_moe", kinds=("text",))
    kernels = checks.check_before_launch(training, steps=10, ranks=1)
    assert (
        kernels == "sdpa in the language model, sdpa in the vision tower; experts: grouped_mm; linear attention: torch"
    )

"""No parameter is accepted and ignored: each reaches the engine (invariant 11)."""

from __future__ import annotations

import ast
import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qvl_pipeline.config import BatchingConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.config.base import Block
from qvl_pipeline.config.training.train import FSDPConfig
from qvl_pipeline.engine import spec as engine_spec
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.training.spec import Inputs, make_spec

SUMMARY = {"steps": 40, "epochs": 2, "fingerprint": "abc", "samples_per_epoch": 100.0}
STREAM = {"dataset_type": "vision_iterable", "max_steps": 7}

# Another value of each parameter.
TRAIN: dict[str, Any] = {
    "optim": "muon",
    "learning_rate": 1e-3,
    "learning_rates": {"vit": 1e-6},
    "weight_decay": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_ratio": 0.1,
    "warmup_steps": 3,
    "bf16": True,
    "fp16": True,
    "ema_decay": 0.9,
    "export_ema": True,
    "export_dtype": "bf16",
    "max_shard_size": "1GB",
    "gradient_checkpointing": ["llm"],
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "max-autotune-no-cudagraphs",
    "freeze_modules": ["visual"],
    "use_liger_kernel": True,
    "use_rmpad": False,
    "sp_ulysses_degree": 2,
    "logging_steps": 2,
    "save_steps": 5,
    "save_total_limit": 3,
    "save_async": False,
    "eval_strategy": "epoch",
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "dataloader_num_workers": 2,
    "dataloader_prefetch_factor": 5,
    "dataloader_pin_memory": False,
    "on_bad_sample": "skip",
    "profile_steps": [2, 3],
    "memory_snapshot_on_oom": True,
    "worst_case_first": True,
    "router_aux_loss_coef": 0.1,
    "keep_checkpoints": ["last"],
    "seed": 7,
}
# What some of them need beside them.
BESIDE: dict[str, dict[str, Any]] = {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
    "export_ema": {"ema_decay": 0.9},
    "torch_compile_backend": {"torch_compile": True},
    "torch_compile_mode": {"torch_compile": True},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 5},
    "load_best_model_at_end": {"eval_strategy": "epoch"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 2},
    "processor_name": {"load_from_pretrained_path": "org/model"},
    "video_total_pixels": {"video_max_frames": 8, "video_min_pixels": 4096},
    "frame_num": {"video_sampling_strategy": "frame_num", "frame_num": 4},
}
FSDP = {
    "transformer_layer_cls_to_wrap": ["Qwen3VLTextMLP"],
    "reshard_after_forward": False,
    "hsdp_shard_size": 2,
    "forward_prefetch": 2,
    "backward_prefetch": 2,
    "accumulate_sharded": True,
    "cpu_offload": True,
    "frozen_sharding": "replicated",
}
RECOMPUTED = {"llm": "selective", "vit": "selective", "every": 2, "offload": True}
LAUNCH = {"ddp_timeout": 99, "step_timeout_s": 77}
MODEL = {
    "processor_name": "org/processor",
    "attn_implementation": "eager",
    "vit_attn_implementation": "eager",
    "image_min_pixels": 4096,
    "image_max_pixels": 50176,
    "linear_attn_implementation": "torch",
    "experts_implementation": "eager",
}
BATCHING = {"packing_length": 256, "per_device_train_batch_size": 3}
SAMPLE = {
    "video_sampling_strategy": "frame_num",
    "fps": 1.5,
    "frame_num": 8,
    "video_min_frames": 6,
    "video_max_frames": 10,
    "video_min_pixels": 4096,
    "video_max_pixels": 102400,
    "video_total_pixels": 10**6,
}
STREAMED = BATCHING | {
    "max_steps": 9,
    "packing": False,
    "packing_strategy": "first_fit",
    "packing_vit_patches": 99,
    "filter_overlong": False,
    "gradient_accumulation_steps": 4,
    "data_parallel_size": 2,
    "shuffle_buffer_size": 9,
    "seed": 7,
}
# For the parent, which starts the engine and follows it; or with one value only; or decided before training.
NOT_THE_ENGINES = {
    TrainConfig: {"fsdp2", "fsdp_config", "launch", "metric_for_best_model", "nproc_per_node", "report_to"}
    | {"resume_from_checkpoint"},
    ModelConfig: {"processor_type", "load_from_pretrained_path", "tiny_seed", "thinking", "ignore_empty_think"},
    BatchingConfig: {"dataset_type", "group_by_length", "max_reject_fraction", "num_train_epochs"},
    SampleConfig: {"video_backend", "materialize", "frame_encoding", "jpeg_quality", "frame_cache", "decode_timeout_s"}
    | {"max_reject_fraction", "num_workers", "memory_gib", "use_audio_in_video"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_text(json.dumps({"path": ".", "family": "qwen3_vl"}))
    return tmp_path


def spec(
    folder: Path,
    train: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    sample: dict[str, Any] | None = None,
    **batching: Any,
) -> TrainSpec:
    return make_spec(
        Inputs(folder, *map(Path, ("tokenized_samples", "stream_samples", "video_frames")), SUMMARY),
        sample=SampleConfig(**(sample or {})),
        model=ModelConfig(processor_type="qwen3_vl", **(model or {})),
        batching=BatchingConfig(**batching),
        weights={"a": 2.0},
        train=TrainConfig(**(train or {})),
        output_dir=folder / "run",
        identity={},
        resume_from="",
    )


@pytest.mark.parametrize(
    ("block", "tried"),
    [
        (TrainConfig, TRAIN),
        (FSDPConfig, FSDP),
        (ModelConfig, MODEL),
        (BatchingConfig, STREAMED),
        (SampleConfig, SAMPLE),
    ],
)
def test_every_parameter_is_tried_below(block: type[Block], tried: dict[str, Any]) -> None:
    assert set(block.model_fields) == set(tried) | NOT_THE_ENGINES.get(block, set())


@pytest.mark.parametrize("name", TRAIN)
def test_training(name: str, folder: Path) -> None:
    beside = BESIDE.get(name, {})
    assert spec(folder, beside | {name: TRAIN[name]}) != spec(folder, beside)


@pytest.mark.parametrize(
    ("block", "name", "value"),
    [("fsdp_config", *item) for item in FSDP.items()] + [("launch", *item) for item in LAUNCH.items()],
)
def test_sharding_and_timeouts(block: str, name: str, value: Any, folder: Path) -> None:
    assert spec(folder, {block: {name: value}}) != spec(folder)


def test_what_is_recomputed(folder: Path) -> None:
    assert asdict(spec(folder, {"gradient_checkpointing": RECOMPUTED}).recompute) == RECOMPUTED
    everything = {"llm": "full", "vit": "full", "every": 1, "offload": False}
    assert asdict(spec(folder, {"gradient_checkpointing": True}).recompute) == everything


@pytest.mark.parametrize("name", MODEL)
def test_model(name: str, folder: Path) -> None:
    beside = BESIDE.get(name, {})
    assert spec(folder, model=beside | {name: MODEL[name]}) != spec(folder, model=beside)


@pytest.mark.parametrize("name", SAMPLE)
def test_sampling(name: str, folder: Path) -> None:
    beside = BESIDE.get(name, {})
    assert spec(folder, sample=beside | {name: SAMPLE[name]}).sampling != spec(folder, sample=beside).sampling


@pytest.mark.parametrize("name", BATCHING)
def test_batches_of_a_plan(name: str, folder: Path) -> None:
    assert spec(folder, **{name: BATCHING[name]}) != spec(folder)


@pytest.mark.parametrize("name", STREAMED)
def test_packs_of_a_stream(name: str, folder: Path) -> None:
    assert spec(folder, **STREAM | {name: STREAMED[name]}).stream != spec(folder, **STREAM).stream


def test_the_engine_looks_at_every_value_of_its_spec() -> None:
    engine = Path(engine_spec.__file__).parent
    trees = (ast.parse(path.read_text()) for path in engine.rglob("*.py") if path.name != "spec.py")
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    groups = [getattr(engine_spec, group.type) for group in dataclasses.fields(TrainSpec)]
    assert {value.name for group in groups for value in dataclasses.fields(group)} - read == set()

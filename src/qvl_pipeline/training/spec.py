"""From parameters and catalog entries to the engine's `train_spec.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_pipeline.config import BatchingConfig, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from qvl_pipeline.engine.spec import TrainSpec

# Parameters that change what is shown, not what is computed: a run may be resumed under other values of these.
_DOES_NOT_CHANGE_TRAINING = (
    "logging_steps",
    "profile_steps",
    "memory_snapshot_on_oom",
    "save_steps",
    "save_total_limit",
    "save_async",
    "report_to",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "on_bad_sample",
    "nproc_per_node",
    "fsdp_config",
    "launch",
    "sp_ulysses_degree",
)
# Evaluations are not noticed by training either, but choose its result where the best step is exported.
_CHOOSES_THE_BEST = ("eval_strategy", "eval_steps")


def run_fingerprint(
    model: ModelConfig, train: TrainConfig, plan_summary: dict[str, Any], contents: Sequence[str]
) -> str:
    """Hash all that decides the outcome of a training: only runs that agree in it resume each other's checkpoints.

    Images are the exception. They lie outside of the project, maybe by the million on slow storage, where even their
    times say little: a copy has others. Whoever changes an image in place under an unfinished run starts it afresh.

    Args:
        model: Parameters of the model.
        train: Parameters of training.
        plan_summary: Facts of the plan, which has a fingerprint of its own.
        contents: Digests of what else counts: base model and frames.

    Returns:
        16 hexadecimal digits.
    """
    left_out = {*_DOES_NOT_CHANGE_TRAINING, *(() if train.load_best_model_at_end else _CHOOSES_THE_BEST)}
    training = {key: value for key, value in train.model_dump().items() if key not in left_out}
    # Where a training starts counts; `auto` and `none` both start at the base model.
    if training["resume_from_checkpoint"] in ("auto", "none"):
        del training["resume_from_checkpoint"]
    content = {"model": model.model_dump(), "train": training, "plan": plan_summary["fingerprint"]}
    content["contents"] = list(contents)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def make_spec(
    *,
    base_model: Path,
    tokenized_samples: Path,
    stream_samples: Path,
    pack_plan: Path,
    video_frames: Path,
    plan_summary: dict[str, Any],
    model: ModelConfig,
    batching: BatchingConfig,
    weights: Mapping[str, float],
    train: TrainConfig,
    output_dir: Path,
    identity: dict[str, str],
    resume_from: str,
    eval_plan: Path | None = None,
) -> TrainSpec:
    """Make the engine's spec.

    Args:
        base_model: Folder with `manifest.json`.
        tokenized_samples: Arrow file.
        stream_samples: Parquet file of the samples of a stream.
        pack_plan: Parquet file.
        video_frames: Folder of the frame store.
        plan_summary: Facts of the plan.
        model: Parameters of the model.
        batching: Parameters of the plan.
        weights: How often a sample of each source is seen per pass.
        train: Parameters of training.
        output_dir: Scratch folder of this very run.
        identity: What a checkpoint of this run says of it.
        resume_from: Checkpoint of another run to start from, or nothing.
        eval_plan: Parquet file of the packs of the eval split, when there is evaluation during training.

    Returns:
        The spec, with absolute paths.
    """
    from qvl_pipeline.engine import spec

    manifest = json.loads((base_model / "manifest.json").read_text())
    path = str(base_model.resolve()) if manifest["path"] == "." else manifest["path"]
    return spec.TrainSpec(
        run=spec.RunSpec(
            output_dir=str(output_dir.resolve()),
            logging_steps=train.logging_steps,
            save_steps=train.save_steps,
            save_total_limit=train.save_total_limit,
            save_async=train.save_async,
            resume_from=resume_from,
            identity=identity,
            ddp_timeout=train.launch.ddp_timeout,
            step_timeout_s=train.launch.step_timeout_s,
            seed=train.seed,
            profile_steps=tuple(train.profile_steps),
            memory_snapshot_on_oom=train.memory_snapshot_on_oom,
        ),
        model=spec.ModelSpec(
            path=path,
            processor=model.processor_name or path,
            family=manifest["family"],
            attn_implementation=model.attn_implementation,
            vit_attn_implementation=model.vit_attn_implementation or model.attn_implementation,
            freeze_modules=tuple(train.freeze_modules),
            gradient_checkpointing=train.checkpointed_towers,
            use_liger_kernel=train.use_liger_kernel,
            image_min_pixels=model.image_min_pixels,
            image_max_pixels=model.image_max_pixels,
            torch_compile=train.torch_compile,
            torch_compile_backend=train.torch_compile_backend,
            torch_compile_mode=train.torch_compile_mode,
        ),
        data=spec.DataSpec(
            tokenized=str(tokenized_samples.resolve()),
            pack_plan=str(pack_plan.resolve()),
            video_frames=str(video_frames.resolve()),
            packing_length=batching.packing_length,
            packs_per_micro_batch=batching.per_device_train_batch_size,
            rmpad=train.use_rmpad,
            epochs=plan_summary["epochs"] or 0.0,
            num_workers=train.dataloader_num_workers,
            prefetch_factor=train.dataloader_prefetch_factor,
            pin_memory=train.dataloader_pin_memory,
            on_bad_sample=train.on_bad_sample,
        ),
        stream=spec.StreamSpec(
            samples=str(stream_samples.resolve()),
            max_steps=batching.max_steps if batching.streamed else 0,
            packs_per_step=batching.packs_per_step,
            packing=batching.packing,
            packing_strategy=batching.packing_strategy,
            packing_length=batching.packing_length,
            packing_vit_patches=batching.packing_vit_patches,
            shuffle_buffer_size=batching.shuffle_buffer_size,
            weights=dict(weights),
            samples_per_epoch=float(plan_summary["samples_per_epoch"]),
            filter_overlong=batching.filter_overlong,
            seed=batching.seed,
        ),
        optim=spec.OptimSpec(
            optim=train.optim,
            learning_rate=train.learning_rate,
            learning_rates=dict(train.learning_rates),
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_epsilon=train.adam_epsilon,
            max_grad_norm=train.max_grad_norm,
            lr_scheduler_type=train.lr_scheduler_type,
            lr_scheduler_kwargs=dict(train.lr_scheduler_kwargs),
            warmup_steps=train.warmup_steps or math.ceil(train.warmup_ratio * plan_summary["steps"]),
            ema_decay=train.ema_decay,
        ),
        parallel=spec.ParallelSpec(
            wrap=tuple(train.fsdp_config.transformer_layer_cls_to_wrap),
            reshard_after_forward=train.fsdp_config.reshard_after_forward,
            hsdp_shard_size=train.fsdp_config.hsdp_shard_size,
            forward_prefetch=train.fsdp_config.forward_prefetch,
            backward_prefetch=train.fsdp_config.backward_prefetch,
            cpu_offload=train.fsdp_config.cpu_offload,
            bf16=train.bf16,
            fp16=train.fp16,
            sp_ulysses_degree=train.sp_ulysses_degree,
        ),
        validation=spec.ValidationSpec(
            strategy=train.eval_strategy,
            steps=train.eval_steps,
            plan=str(eval_plan.resolve()) if eval_plan else "",
            load_best=train.load_best_model_at_end,
        ),
        export=spec.ExportSpec(
            output_dir=str((output_dir / "export").resolve()),
            ema=train.export_ema,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[train.export_dtype],
            max_shard_bytes=train.max_shard_bytes,
        ),
    )

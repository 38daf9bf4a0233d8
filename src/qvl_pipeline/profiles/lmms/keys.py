"""The keys of LMMS Engine 0.1.4, by the part of a file that they are in, and what becomes of each.

Those of `trainer_args` are its own and transformers' `TrainingArguments`. What LMMS Engine reads and does nothing with
is taken here at its word.
"""

from __future__ import annotations

from typing import Any

from qvl_pipeline.families import FAMILIES
from qvl_pipeline.profiles.lmms.rules import Noted, Refused, Rule, Same, To, Together, only

# Names that LMMS Engine has for what has another here.
_DATASET_TYPES = {"qwen_omni": "vision_audio"}
_FAMILIES = {"Qwen2_5OmniProcessor": "qwen2_5_omni"}


def _dataset_type(value: Any) -> Any:
    if value == "qwen_omni_iterable":
        raise ValueError("sound is not read as a stream here: take vision_audio, which is planned beforehand")
    return _DATASET_TYPES.get(value, value)


def _strategy(value: Any) -> Any:
    if str(value).startswith("window"):
        raise ValueError("windows of rows are not packed here: first_fit keeps the order, best_fit fills packs best")
    return value


def _family(value: Any) -> Any:
    family = _FAMILIES.get(value, value)
    if family not in FAMILIES:
        raise ValueError(f"the families here are {', '.join(FAMILIES)}")
    return family


def _parts(value: Any) -> Any:
    """Return our names of parts; dotted paths of other modules become globs."""
    named = [name.removeprefix("model.") for name in (value or [])]
    parts = {
        "visual.merger": "merger",
        "language_model": "llm",
        "language_model.embed_tokens": "embed",
        "lm_head": "head",
    }
    return [parts.get(name, name if "." not in name else f"*{name}.*") for name in named]


def _steps_by_default(value: Any) -> Any:
    return "no" if value in (False, None) else value


def _trackers(value: Any) -> Any:
    # The only tracker that is always installed is MLflow; it is what compares and replays runs, so it stays.
    names = [value] if isinstance(value, str) else list(value)
    if names in (["none"], ["all"]):
        return ["none" if names == ["none"] else "mlflow"]
    return ["mlflow", *(name for name in names if name != "mlflow")]


def _start_anew(value: Any) -> Any:
    return "none" if value else "auto"


def _resume(value: Any) -> Any:
    if isinstance(value, str) and value not in ("auto", "none"):
        raise ValueError("LMMS Engine's checkpoints cannot be read here: export that model, and start from its folder")
    return "auto" if value in (True, "auto") else "none"


DATASET: dict[str, Rule] = {
    "dataset_type": To("batching.dataset_type", _dataset_type),
    "dataset_format": Together(),
    "dataset_path": Together(),
    "datasets": Together(),
    "eval_dataset_path": Together(),
    "shuffle": Together(),
    "data_seed": To("batching.seed"),
    "object_storage": Same(("none",), "path and data_folder of a source may be URLs (gs://…, az://…)"),
    "bucket_name": Refused("write URLs (gs://bucket/…) into path and data_folder of the sources"),
    "packing": To("batching.packing", default=False),
    "packing_strategy": To("batching.packing_strategy", _strategy),
    "packing_length": To("batching.packing_length", default=32000),
    "filter_overlong": To("batching.filter_overlong"),
    "filter_overlong_workers": Noted("lengths are counted by the stage `tokenize`, with as many processes as fit"),
    "max_length": Refused("samples have one limit here: write it as packing_length"),
    "video_backend": To("sample.video_backend"),
    "video_sampling_strategy": To("sample.video_sampling_strategy"),
    "video_max_pixels": To("sample.video_max_pixels"),
    "video_min_pixels": To("sample.video_min_pixels", default=3136),
    "video_max_frames": To("sample.video_max_frames"),
    "frame_num": Together(),
    "fps": Together(),
    "extra_kwargs": Same(({},), "packing and decoding take no more arguments here"),
}

PROCESSOR: dict[str, Rule] = {
    "processor_name": To("model.processor_name"),
    "processor_type": To("model.processor_type", _family),
    "image_min_pixels": To("model.image_min_pixels"),
    "image_max_pixels": To("model.image_max_pixels"),
    "video_min_pixels": To("sample.video_min_pixels"),
    "video_max_pixels": To("sample.video_max_pixels"),
}

MODEL: dict[str, Rule] = {
    "load_from_pretrained_path": To("model.load_from_pretrained_path"),
    "load_from_config": Refused("only tiny models start without weights here: name a model to load"),
    "attn_implementation": To("model.attn_implementation", default="sdpa"),
    "model_general_type": Same(("image_text_to_text", "general"), "models here answer in text, to pictures and text"),
    "model_type": To("model.processor_type", _family),
    "torch_dtype": Noted("trained weights are float32, and bf16 says in what is computed"),
    "overwrite_config": Same(({},), "the model is what its config.json says"),
    "monkey_patch_kwargs": Same(({},), "nothing is patched here: use_liger_kernel and use_rmpad say which kernels run"),
    "extra_kwargs": Same(({},), "from_pretrained takes no more arguments here"),
}

_UNUSED = "LMMS Engine's FSDP2 trainer does nothing with it, and there is nothing like it here: take it out"

TRAINER: dict[str, Rule] = {
    "output_dir": Noted("the model is in data/06_models/<profile>/trained, reports are in data/08_reporting/<profile>"),
    "run_name": Noted("runs in MLflow have the profile's name"),
    "project": Noted("runs in MLflow are in the experiment that conf/base/mlflow.yml names"),
    "logging_dir": Noted("logs are in the run's folder, data/06_models/<profile>/scratch"),
    "report_to": To("train.report_to", _trackers),
    # The global batch.
    "per_device_train_batch_size": To("batching.per_device_train_batch_size", default=8),
    "gradient_accumulation_steps": To("batching.gradient_accumulation_steps"),
    "num_train_epochs": Together(),
    "max_steps": To("batching.max_steps"),
    "group_by_length": To("batching.group_by_length"),
    "data_seed": To("batching.seed"),
    # Optimisation.
    "optim": To("train.optim", lambda value: {"adamw_bnb_8bit": "adamw_8bit"}.get(value, value)),
    "use_muon": To("train.optim", lambda value: "muon" if value else "adamw_torch_fused"),
    "learning_rate": To("train.learning_rate", default=5e-5),
    "weight_decay": To("train.weight_decay"),
    "adam_beta1": To("train.adam_beta1"),
    "adam_beta2": To("train.adam_beta2"),
    "adam_epsilon": To("train.adam_epsilon"),
    "max_grad_norm": To("train.max_grad_norm"),
    "lr_scheduler_type": Together(),
    "lr_scheduler_kwargs": Together(),
    "warmup_ratio": To("train.warmup_ratio"),
    "warmup_steps": To("train.warmup_steps"),
    "seed": To("train.seed"),
    "ema_decay": To("train.ema_decay"),
    "ema_enabled": Same((True, False), "an average is kept when ema_decay is positive"),
    "ema_update_every": Same((1,), "the average is updated at every step: 1"),
    "ema_start_step": Same((0,), "the average is kept from the first step on: 0"),
    "ema_requires_grad_only": Same((True,), "what is not trained has no average"),
    "ema_param_filter": Same((None, {}), "the average is of everything that is trained"),
    "ema_resume_from_ema": Same((False,), "a resumed run continues the weights, and their average beside them"),
    # Precision, memory and kernels.
    "bf16": To("train.bf16", default=False),
    "fp16": To("train.fp16"),
    "tf32": Refused("float32 is computed in full here: take it out, and set bf16"),
    "reduce_dtype": Noted("gradients are summed over the ranks in float32"),
    "output_dtype": Noted("losses are float32"),
    "gradient_checkpointing": To("train.gradient_checkpointing", default=False),
    "gradient_checkpointing_kwargs": Same(({}, {"use_reentrant": False}), "it is not reentrant"),
    "torch_compile": To("train.torch_compile"),
    "torch_compile_backend": To("train.torch_compile_backend"),
    "torch_compile_mode": To("train.torch_compile_mode"),
    "torch_empty_cache_steps": Refused("the allocator's cache is not emptied here: take it out"),
    "freeze_modules": To("train.freeze_modules", _parts),
    "use_liger_kernel": To("train.use_liger_kernel", default=False),
    "use_rmpad": To("train.use_rmpad"),
    # Parallelism.
    "fsdp2": To("train.fsdp2", only(True, reason="FSDP2 is the only strategy here: set it to true")),
    "fsdp": Same(("", [], None), "FSDP2 is set up by fsdp_config"),
    "sp_ulysses_degree": To("train.sp_ulysses_degree"),
    "tp_degree": Same((1,), "there is no tensor parallelism here, but sp_ulysses_degree and FSDP2's sharding"),
    "ep_degree": Same((1,), "there is no expert parallelism here, but FSDP2's sharding"),
    "ddp_timeout": To("train.launch.ddp_timeout"),
    "ddp_backend": Same((None, "nccl"), "NCCL on GPUs, gloo on CPUs"),
    "deepspeed": Refused("FSDP2 is the only strategy here: take it out"),
    "average_tokens_across_devices": Same((True,), "losses are weighted by the tokens of the whole step"),
    # Steps, checkpoints, evaluations.
    "do_train": Same((True,), "the stage `train` trains"),
    "do_eval": Same((True, False), "eval_strategy says when the loss over the eval split is computed"),
    "logging_strategy": Same(("steps",), "metrics are logged every logging_steps"),
    "logging_steps": To("train.logging_steps"),
    "logging_first_step": Same((False,), "metrics are logged every logging_steps"),
    "save_strategy": Same(("steps",), "checkpoints are saved every save_steps, and at the end"),
    "save_steps": To("train.save_steps", default=500),
    "save_total_limit": To("train.save_total_limit"),
    "save_safetensors": Same((True,), "models are exported as safetensors"),
    "save_only_model": Same((False,), "checkpoints can be continued; the exported model is without what that takes"),
    "overwrite_output_dir": To("train.resume_from_checkpoint", _start_anew),
    "resume_from_checkpoint": To("train.resume_from_checkpoint", _resume),
    "eval_strategy": To("train.eval_strategy", _steps_by_default),
    "evaluation_strategy": To("train.eval_strategy", _steps_by_default),
    "eval_steps": To("train.eval_steps"),
    "per_device_eval_batch_size": Noted("the loss over the eval split is computed in packs of packing_length"),
    "load_best_model_at_end": To("train.load_best_model_at_end"),
    "metric_for_best_model": To("train.metric_for_best_model", lambda value: {"loss": "eval_loss"}.get(value, value)),
    "greater_is_better": Same((False, None), "the best loss is the lowest"),
    "eval_config": Refused(
        "no server of lmms-eval is asked: the stage `evaluate` lets the model answer (docs/evaluation.md)"
    ),
    # Loader.
    "dataloader_num_workers": To("train.dataloader_num_workers", default=0),
    "dataloader_prefetch_factor": To("train.dataloader_prefetch_factor"),
    "dataloader_pin_memory": To("train.dataloader_pin_memory"),
    "dataloader_persistent_workers": Same((True,), "loader processes live as long as the run"),
    "dataloader_drop_last": Same((False,), "no sample is dropped: the last step is smaller"),
    "remove_unused_columns": Same((False,), "rows keep their columns"),
    # Watching.
    "enable_profiler": Same((False,), "steps are traced by profile_steps, such as [10, 12]"),
    "profiler_config": Refused("set profile_steps in the profile, such as [10, 12]"),
    "enable_memory_snapshot": To("train.memory_snapshot_on_oom"),
    "memory_snapshot_config": Refused("memory_snapshot_on_oom has no more to say: take it out"),
    "enable_cuda_event_profiler": Same((False,), "step times of every rank are metrics; profile_steps traces more"),
    "cuda_event_profiler_config": Refused("step times of every rank are metrics; profile_steps traces more"),
    "print_batch_input_steps": Same((-1,), "what the model reads is in label_preview.html"),
    "carbon_intensity": Refused("nothing is said of CO2 here: take it out"),
    "disable_tqdm": Noted("a terminal has a progress bar, a log file has none"),
    "push_to_hub": Same((False,), "nothing is uploaded; `hf upload` takes the exported folder"),
    "use_cpu": Same((False,), "GPUs are used when they are there, else the CPU"),
    **dict.fromkeys(
        (
            *("optim_args", "label_smoothing_factor", "neftune_noise_alpha", "full_determinism", "ignore_data_skip"),
            *("include_num_input_tokens_seen", "label_names", "hub_model_id", "hub_strategy", "accelerator_config"),
            *("auto_find_batch_size", "past_index", "jit_mode_eval", "torchdynamo", "ray_scope", "log_level"),
        ),
        Refused(_UNUSED),
    ),
}

FSDP: dict[str, Rule] = {
    "transformer_layer_cls_to_wrap": To(
        "train.fsdp_config.transformer_layer_cls_to_wrap", lambda value: [value] if isinstance(value, str) else value
    ),
    "reshard_after_forward": To("train.fsdp_config.reshard_after_forward"),
    "hsdp_shard_size": To("train.fsdp_config.hsdp_shard_size"),
}

# What stands beside the parts, at the top of a file.
TOP: dict[str, Rule] = {
    "trainer_type": Same(("fsdp2_trainer",), "the trainer here shards with FSDP2"),
    "extra_kwargs": Same(({},), "nothing takes more arguments here"),
    "config_yaml": Same((None,), "this is the file"),
}

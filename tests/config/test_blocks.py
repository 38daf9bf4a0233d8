"""Parameters blocks refuse what they cannot honour, in one sentence."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from qvl_pipeline import config
from qvl_pipeline.config.base import Block

BLOCKS = [*config.BLOCKS.values(), config.DatasetSource, config.DigitsDemoConfig, config.FSDPConfig]


STREAM = {"dataset_type": "vision_iterable", "max_steps": 10}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_unknown_key_is_an_error(block: type[Block]) -> None:
    with pytest.raises(ValidationError, match="unknown key 'no_such_key'"):
        block.model_validate({"no_such_key": 1})


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_every_parameter_is_documented(block: type[Block]) -> None:
    documentation = inspect.getdoc(block) or ""
    for name in block.model_fields:
        assert f"\n    {name}: " in documentation, f"{block.__name__}.{name} is missing in the docstring"


def test_a_switch_is_taken_where_one_is_meant() -> None:
    assert config.TrainConfig(gradient_checkpointing=True, load_best_model_at_end=False).gradient_checkpointing is True


def test_misspelt_key_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match="unknown key 'learning_rat': did you mean 'learning_rate'"):
        config.TrainConfig.model_validate({"learning_rat": 1e-4})


@pytest.mark.parametrize(
    ("block", "values", "sentence"),
    [
        (config.BatchingConfig, {"dataset_type": "qwen3_vl_iterable"}, "set max_steps"),
        (config.BatchingConfig, {"shuffle_buffer_size": 100}, "shuffle_buffer_size is for iterable types"),
        (
            config.BatchingConfig,
            STREAM | {"packing": False, "group_by_length": True},
            "group_by_length needs the lengths",
        ),
        (config.TrainConfig, {"report_to": ["mlflow", "mlflow"]}, "report_to names 'mlflow' twice"),
        (config.TrainConfig, {"learning_rate": float("inf")}, "should be a finite number"),
        (config.EvaluateConfig, {"must_not_regress": {"overall": float("nan")}}, "should be a finite number"),
        (config.TrainConfig, {"save_steps": True}, "a number is needed"),
        (config.TrainConfig, {"nproc_per_node": True}, "a number is needed"),
        (config.EvaluateConfig, {"max_samples": True}, "a number is needed"),
        (config.BatchingConfig, {"seed": -1}, "greater than or equal to 0"),
        (config.IngestConfig, {"datasets": [{"path": "", "data_type": "json"}]}, "at least 1 character"),
        (config.SampleConfig, {"frame_num": 8}, "frame_num is for video_sampling_strategy: frame_num, but"),
        (config.SampleConfig, {"jpeg_quality": 80}, "jpeg_quality is for frame_encoding: jpeg, but"),
        (config.TrainConfig, {"dataloader_prefetch_factor": 4}, "set dataloader_num_workers"),
        (config.TrainConfig, {"on_bad_sample": "skip", "sp_ulysses_degree": 2}, "'skip' needs sp_ulysses_degree 1"),
        (config.BatchingConfig, {"max_steps": 0}, "nothing would be trained"),
        (config.SampleConfig, {"video_max_pixels": 50176}, "lower video_min_pixels with it"),
        (config.SampleConfig, {"video_min_frames": 9, "video_max_frames": 8}, "lower video_min_frames"),
        (config.SampleConfig, {"frame_encoding": "webp"}, "Input should be 'zstd', 'png', 'raw' or 'jpeg'"),
        (config.SampleConfig, {"materialize": False, "frame_encoding": "jpeg"}, "set frame_encoding: zstd"),
        (
            config.ModelConfig,
            {"processor_type": "qwen3_vl", "image_min_pixels": 9, "image_max_pixels": 8},
            "above image_max_pixels",
        ),
        (config.ModelConfig, {"processor_type": "qwen3_vl", "processor_name": "x"}, "needs load_from_pretrained_path"),
        (config.TrainConfig, {"report_to": ["none", "mlflow"]}, "'none' excludes"),
        (config.TrainConfig, {"nproc_per_node": 0}, "at least 1"),
        (config.TrainConfig, {"seed": -1}, "greater than or equal to 0"),
        (config.TrainConfig, {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "has no warmup"),
        (config.ValidateConfig, {"max_aspect_ratio": 500}, "less than or equal to 200"),
        (config.ValidateConfig, {"min_video_frames": 1}, "greater than or equal to 2"),
        (config.TrainConfig, {"sp_ulysses_degree": 3}, "Input should be 1, 2, 4 or 8"),
        (config.TrainConfig, {"sp_ulysses_degree": 2, "use_rmpad": False}, "shares packs, which use_rmpad: false"),
        (config.TrainConfig, {"eval_strategy": "step"}, "Input should be 'no', 'steps' or 'epoch'"),
        (config.TrainConfig, {"eval_strategy": "steps"}, "'steps' needs a positive number of steps"),
        (config.TrainConfig, {"eval_strategy": "epoch", "eval_steps": 5}, "nothing else has any"),
        (config.TrainConfig, {"load_best_model_at_end": True}, "needs evaluations to compare"),
        (
            config.TrainConfig,
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "ema_decay": 0.9, "export_ema": True},
            "choose one",
        ),
        (config.TrainConfig, {"metric_for_best_model": "loss"}, "Input should be 'eval_loss'"),
        (config.TrainConfig, {"profile_steps": [5]}, "give the first and the last step"),
        (config.TrainConfig, {"profile_steps": [5, 4]}, "give the first and the last step"),
        (
            config.TrainConfig,
            {"lr_scheduler_type": "cosin"},
            "unknown lr_scheduler_type 'cosin': did you mean 'cosine'",
        ),
        (config.TrainConfig, {"lr_scheduler_type": "reduce_lr_on_plateau"}, "depends on the losses"),
        (config.TrainConfig, {"lr_scheduler_kwargs": {"min_lr": 1e-6}}, "'cosine' has no argument 'min_lr'"),
        (config.TrainConfig, {"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        (config.TrainConfig, {"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        (
            config.TrainConfig,
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
            "min_lr 0.001 is above the peak .* choose at most learning_rate 1e-05",
        ),
        (
            config.TrainConfig,
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1e-6}},
            "lr_end must be a number that is not negative, but is -1e-06",
        ),
        (
            config.TrainConfig,
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 2}},
            "min_lr_rate 2 is a share of the peak rate: choose one between 0 and 1",
        ),
        (
            config.TrainConfig,
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": "0.1"}},
            "min_lr_rate must be a number that is not negative, but is '0.1'",
        ),
        (config.TrainConfig, {"optim": "adam"}, "Input should be 'adamw_torch_fused'"),
        (
            config.ModelConfig,
            {"processor_type": "qwen3_vl", "attn_implementation": "flash"},
            "attn_implementation\n  Input should be 'auto', 'flash_attention_2'",
        ),
        (
            config.ModelConfig,
            {"processor_type": "qwen3_vl", "vit_attn_implementation": "xformers"},
            "vit_attn_implementation\n  Input should be 'auto', 'flash_attention_2'",
        ),
        (config.BatchingConfig, {"packing_strategy": "worst_fit"}, "Input should be 'best_fit'"),
        (config.TrainConfig, {"learning_rates": {"lm": 1e-5}}, "Input should be 'vit'"),
        (config.TrainConfig, {"export_ema": True}, "set ema_decay"),
        (config.TrainConfig, {"gradient_checkpointing": ["llms"]}, "Input should be 'llm' or 'vit'"),
        (
            config.TrainConfig,
            {"gradient_checkpointing": {"llm": "some"}},
            "Input should be 'none', 'selective' or 'full",
        ),
        (config.TrainConfig, {"gradient_checkpointing": {"lm": "full"}}, "unknown key 'lm': did you mean 'llm'"),
        (config.TrainConfig, {"gradient_checkpointing": {"every": 2}}, "every and offload are for recomputed towers"),
        (
            config.TrainConfig,
            {"gradient_checkpointing": {"llm": "full", "offload": True}, "torch_compile": True},
            "offload copies from within blocks.*, or torch_compile, to false",
        ),
        (config.TrainConfig, {"optim": "adamw_bf16"}, "holds weights in bfloat16, so set bf16 to true"),
        (config.FSDPConfig, {"frozen_sharding": "replicated", "cpu_offload": True}, "cpu_offload .*: choose one"),
        (config.TrainConfig, {"torch_compile_mode": "reduce-overhead"}, "Input should be 'default'"),
        (config.IngestConfig, {"datasets": []}, "at least 1 item"),
        (
            config.IngestConfig,
            {"datasets": [{"name": "a", "path": "x", "data_type": "json"}] * 2},
            "the name 'a' is used twice",
        ),
    ],
)
def test_illegal_value_has_a_sentence(block: type[Block], values: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        block.model_validate(values)


def test_global_batch_is_declared() -> None:
    batching = config.BatchingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3, data_parallel_size=4)
    assert batching.packs_per_step == 24


def test_one_tracker_may_be_given_as_a_string() -> None:
    assert config.TrainConfig(report_to="wandb").report_to == ["wandb"]


def test_gradient_checkpointing_is_of_both_towers_or_of_those_named() -> None:
    def towers(given: object) -> tuple[str, str]:
        recomputed = config.TrainConfig(gradient_checkpointing=given).recomputed
        assert (recomputed.every, recomputed.offload) == (1, False)
        return recomputed.llm, recomputed.vit

    assert towers(False) == towers([]) == towers({}) == ("none", "none")
    assert towers(True) == ("full", "full")
    assert towers(["vit"]) == ("none", "full")
    assert towers({"llm": "selective"}) == ("selective", "none")
    given = {"llm": "full", "every": 2, "offload": True}
    recomputed = config.TrainConfig(gradient_checkpointing=given).recomputed
    assert recomputed.model_dump() == {"llm": "full", "vit": "none", "every": 2, "offload": True}


@pytest.mark.parametrize(("family", "side"), [("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_an_image_has_as_many_tokens_by_default_whatever_the_family(family: str, side: int) -> None:
    assert config.ModelConfig(processor_type=family).image_max_pixels == 1280 * side**2
    assert config.ModelConfig(processor_type=family, image_max_pixels=10**5).image_max_pixels == 10**5

"""From parameters and catalog entries to the engine's `train_spec.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qvl_pipeline.config import AdapterConfig, BatchingConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.config.training.adapter import NO_ADAPTER
from qvl_pipeline.data.base_model import read_base_model
from qvl_pipeline.errors import UserError
from qvl_pipeline.training.scratch import EVAL_PLAN, EXPORT, PACK_PLAN

if TYPE_CHECKING:
    from qvl_pipeline.engine.spec import TrainSpec

Group = TypeVar("Group")


@dataclass(frozen=True)
class Inputs:
    """The catalog entries that a training reads.

    Attributes:
        base_model: Folder with `manifest.json`.
        tokenized_samples: Arrow file.
        stream_samples: Parquet file of the samples of a stream.
        video_frames: Folder of the frame store.
        plan_summary: Facts of the plan.
    """

    base_model: Path
    tokenized_samples: Path
    stream_samples: Path
    video_frames: Path
    plan_summary: dict[str, Any]


def make_spec(
    inputs: Inputs,
    *,
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    weights: Mapping[str, float],
    train: TrainConfig,
    output_dir: Path,
    identity: dict[str, str],
    resume_from: str,
    adapter: AdapterConfig = NO_ADAPTER,
    expected_peak_bytes: int = 0,
) -> TrainSpec:
    """Make the engine's spec.

    Args:
        inputs: What the training reads.
        sample: Parameters of sampling.
        model: Parameters of the model.
        batching: Parameters of the plan.
        weights: How often a sample of each source is seen per pass.
        train: Parameters of training.
        output_dir: Folder the engine works in, which has the plans.
        identity: What the run and a checkpoint it starts from must agree in.
        resume_from: Checkpoint to start from; empty for the base model.
        adapter: Parameters of the adapter.
        expected_peak_bytes: Peak of a rank's tensors that the preflight foretold; 0 where nothing was.

    Raises:
        UserError: Two blocks say different things.
    """
    from qvl_pipeline.engine import spec

    base_model, summary = read_base_model(inputs.base_model), inputs.plan_summary
    frames = str(inputs.video_frames.resolve())
    return spec.TrainSpec(
        run=_filled(
            spec.RunSpec,
            *(train, train.launch),
            output_dir=str(output_dir.resolve()),
            resume_from=resume_from,
            identity=identity,
            expected_peak_bytes=expected_peak_bytes,
        ),
        model=_filled(
            spec.ModelSpec,
            *(model, train),
            path=base_model.path,
            processor=model.processor_name or base_model.path,
            family=base_model.family,
            vit_attn_implementation=model.vit_attn_implementation or model.attn_implementation,
        ),
        recompute=_filled(spec.RecomputeSpec, train.recomputed),
        data=_filled(
            spec.DataSpec,
            *(batching, train),
            tokenized=str(inputs.tokenized_samples.resolve()),
            pack_plan=str((output_dir / PACK_PLAN).resolve()),
            video_frames=frames,
            epochs=summary["epochs"] or 0.0,
        ),
        stream=_filled(
            spec.StreamSpec,
            batching,
            samples=str(inputs.stream_samples.resolve()),
            max_steps=batching.max_steps if batching.streamed else 0,
            weights=dict(weights),
            samples_per_epoch=float(summary["samples_per_epoch"]),
        ),
        optim=_filled(
            spec.OptimSpec,
            train,
            learning_rates=_learning_rates(train, adapter),
            warmup_steps=train.warmup_steps or math.ceil(train.warmup_ratio * summary["steps"]),
        ),
        parallel=_filled(spec.ParallelSpec, train, train.fsdp_config),
        validation=_filled(
            spec.ValidationSpec,
            train,
            plan=str((output_dir / EVAL_PLAN).resolve()) if train.eval_strategy != "no" else "",
        ),
        sampling=_filled(spec.SamplingSpec, sample),
        export=_filled(
            spec.ExportSpec,
            train,
            output_dir=str((output_dir / EXPORT).resolve()),
            keep_checkpoints=train.kept,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[train.export_dtype],
        ),
        adapter=_filled(spec.AdapterSpec, adapter),
    )


def _learning_rates(train: TrainConfig, adapter: AdapterConfig) -> dict[str, float]:
    """Return the rates of parts from the two blocks that have some.

    Raises:
        UserError: Both have the rate of one part.
    """
    if adapter.type == "none":
        return train.learning_rates
    if doubled := sorted(set(train.learning_rates) & set(adapter.learning_rates)):
        raise UserError(
            f"train.learning_rates and adapter.learning_rates both have a rate of '{doubled[0]}': keep one of them"
        )
    return {**train.learning_rates, **adapter.learning_rates}


def _filled(group: type[Group], *blocks: Any, **given: Any) -> Group:
    """Fill a group of the spec: a value that is not given is the parameter of its name, in one of the blocks."""
    values = dict(given)
    for name in (field.name for field in dataclasses.fields(group)):
        if name not in given:
            (value,) = (getattr(block, name) for block in blocks if hasattr(block, name))
            values[name] = tuple(value) if isinstance(value, list) else value
    return group(**values)

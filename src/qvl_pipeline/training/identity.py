"""What makes two trainings the same one: which continues the other's checkpoints, and which may start from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvl_pipeline.config import AdapterConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.config.training.adapter import NO_ADAPTER
from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.lineage.digests import content_digest


def run_fingerprint(
    sample: SampleConfig,
    model: ModelConfig,
    train: TrainConfig,
    plan_summary: dict[str, Any],
    contents: Sequence[str],
    adapter: AdapterConfig = NO_ADAPTER,
) -> str:
    """Hash all that decides the outcome of a training: only runs that agree in it resume each other's checkpoints.

    Images are the exception. They lie outside of the project, maybe by the million on slow storage, where even their
    times say little: a copy has others. Whoever changes an image in place under an unfinished run starts it afresh.

    Args:
        sample: Parameters of sampling, which the exported processor has too.
        model: Parameters of the model.
        train: Parameters of training.
        plan_summary: Facts of the plan, which has a fingerprint of its own.
        contents: Digests of what else counts: base model and frames.
        adapter: Parameters of the adapter.

    Returns:
        16 hexadecimal digits.
    """
    content = {
        "sample": sample.decisive(),
        "model": model.decisive(),
        "train": train.decisive(),
        # What was trained without adapters before there were any goes on.
        **({"adapter": adapter.decisive()} if adapter.type != "none" else {}),
        "plan": plan_summary["fingerprint"],
        "contents": list(contents),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def adapter_digest(adapter: AdapterConfig) -> list[str]:
    """Return the digest of the adapter that a training goes on from, if there is one.

    Raises:
        UserError: It is not there.
    """
    if adapter.type == "none" or not adapter.start_from:
        return []
    if not Path(adapter.start_from).is_dir():
        raise UserError(
            f"adapter.start_from: {adapter.start_from} is not a folder: give that of an adapter in peft's format"
        )
    return [content_digest(Path(adapter.start_from))]


def run_identity(
    base_model: str,
    model: ModelConfig,
    train: TrainConfig,
    plan_fingerprint: str,
    adapter: AdapterConfig = NO_ADAPTER,
) -> dict[str, str]:
    """Say what a run and a checkpoint it starts from must agree in, by parameter.

    The base model by the digest of its content; the plan, because a checkpoint's step is a position in it; the rest,
    because it decides which tensors there are.
    """
    return {
        "base_model": base_model,
        "model.processor_type": model.processor_type,
        "plan": plan_fingerprint,
        "train.freeze_modules": ", ".join(sorted(train.freeze_modules)) or "none",
        "train.optim": train.optim.removesuffix("_fused"),
        "train.ema_decay": "set" if train.ema_decay else "0",
        # Not "none" where there is none: checkpoints from before there were adapters are as good as ever.
        **({"adapter": _tensors_of(adapter)} if adapter.type != "none" else {}),
    }


def _tensors_of(adapter: AdapterConfig) -> str:
    """Say which tensors an adapter has, and what they mean."""
    names = ["type", "r", "alpha", "rslora", "init", "targets", "train_fully"]
    names += ["quantize_base", "double_quant", "quantize_parts"] if adapter.quantizes else []
    return json.dumps({name: getattr(adapter, name) for name in names}, sort_keys=True)


def checkpoint_to_start_from(train: TrainConfig, identity: Mapping[str, str]) -> str:
    """Return the absolute path in `resume_from_checkpoint`, or nothing when it names none.

    Raises:
        UserError: It does not exist, is not complete, or belongs to a run that differs in its identity.
    """
    if train.resume_from_checkpoint in ("auto", "none"):
        return ""
    from qvl_pipeline.engine.run.checkpoint_files import CheckpointError, read_marker

    path = Path(train.resume_from_checkpoint).resolve()
    try:
        found = read_marker(path)["identity"]
    except CheckpointError as error:
        raise UserError(f"train.resume_from_checkpoint: {error}") from error
    if differing := sorted(key for key in {*identity, *found} if found.get(key) != identity.get(key)):
        values = "; ".join(f"{key}: {found.get(key)} there, {identity.get(key)} here" for key in differing)
        raise UserError(
            f"train.resume_from_checkpoint: {path} belongs to a run of another kind ({values}). Base model, plan, "
            "frozen parts, adapter, optimizer and average must be the same; rates, schedule, precision and processes "
            "may differ"
        )
    return str(path)

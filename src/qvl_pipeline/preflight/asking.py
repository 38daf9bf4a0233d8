"""From the parameters of a profile to the answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from qvl_pipeline.config import AdapterConfig, BatchingConfig, ModelConfig, PreflightConfig, SampleConfig, TrainConfig
from qvl_pipeline.config.training.recomputation import GradientCheckpointingConfig
from qvl_pipeline.data.base_model import MANIFEST, read_base_model
from qvl_pipeline.errors import UserError
from qvl_pipeline.preflight.verdict import DOES_NOT_FIT, FITS, OFF, UNKNOWN, Plan, look_ahead
from qvl_pipeline.storage.digests import read_sealed
from qvl_pipeline.training.ahead import spec_ahead, write_base_ahead
from qvl_pipeline.training.processes import training_processes

logger = logging.getLogger(__name__)


def ask(
    plan: Plan,
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    adapter: AdapterConfig,
    preflight: PreflightConfig,
    base_model: Path,
    recorded: Sequence[Path],
) -> dict[str, Any]:
    """Answer what the training of a profile needs; reads no weights, and of a published model nothing at all.

    Args:
        plan: Its plan, if there is one.
        sample: Parameters of sampling.
        model: Parameters of the model.
        batching: Parameters of the packs.
        train: Parameters of training.
        adapter: Parameters of the adapter.
        preflight: On what it is to run.
        base_model: Folder of the profile's base model, which need not be there: without it, its sizes are those of the
            parameters.
        recorded: Files `train_result.json` of earlier trainings, those to be preferred first.

    Returns:
        The entry `preflight_report`.

    Raises:
        UserError: Says what is wrong and what to do.
    """
    if preflight.mode == OFF:
        return {"verdict": OFF, "sentence": "the preflight is off"}
    if reason := model.family.unsupported.get("preflight"):
        return {"verdict": OFF, "sentence": f"nothing is foretold of {model.family.title}: {reason}"}
    processes = training_processes(train, batching)
    scratch = base_model.parent / "scratch"
    with TemporaryDirectory() as temporary:
        if not _is_prepared(base_model, model):
            base_model = Path(temporary)
            write_base_ahead(base_model, model)
        steps = int(plan.packs["step"].iloc[-1]) + 1 if plan.there else max(0, batching.max_steps)
        spec = spec_ahead(base_model, plan.frames, steps, sample, model, batching, train, adapter, scratch)
        ranks = processes.per_node, processes.nodes.nnodes
        automatic = train.gradient_checkpointing == "auto"
        try:
            return look_ahead(spec, model, batching, preflight, plan, ranks, recorded, automatic=automatic)
        except UserError:
            raise
        except Exception as error:  # of a model that computes with what the meta device has not: it trains all the same
            logger.warning("what this training needs cannot be foretold", exc_info=True)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return {"verdict": UNKNOWN, "sentence": f"what this training needs cannot be foretold: {reason}"}


def plan_of(model_input: Path, summary: Path, batching: BatchingConfig) -> Plan:
    """Return the plan of a profile, if there is one and it was made for packs of this length.

    Args:
        model_input: Folder of the plan.
        summary: Its `plan_summary`.
        batching: Parameters of the packs.
    """
    packs, tokenized, frames = (model_input / name for name in ("pack_plan.parquet", "tokenized.arrow", "video_frames"))
    if not (packs.exists() and tokenized.exists() and summary.exists()):
        return Plan(None, None, frames)
    if read_sealed(summary)["packing_length"] != batching.packing_length:
        logger.warning("the plan that is there is of packs of another length, and is not looked at: run 'tokenize'")
        return Plan(None, None, frames)
    return Plan(pd.read_parquet(packs), tokenized, frames)


def _is_prepared(base_model: Path, model: ModelConfig) -> bool:
    """Whether the base model is there and was prepared for these parameters."""
    if not (base_model / MANIFEST).exists():
        return False
    return read_base_model(base_model).parameters == model.decisive("tokens")


def recorded_trainings(reports: Path, profile: str) -> list[Path]:
    """Return what earlier trainings left in the folder of reports: that of the profile itself first."""
    found = [reports / profile / "train_result.json", *sorted(reports.glob("*/train_result.json"))]
    return [path for path in dict.fromkeys(found) if path.exists()]


def refuse_what_cannot_fit(report: dict[str, Any], preflight: PreflightConfig) -> None:
    """End a training that does not fit, even with the error of the estimate, unless only a warning is wanted.

    Raises:
        UserError: It does not; says what makes it fit.
    """
    if report["verdict"] == DOES_NOT_FIT and preflight.mode == "refuse":
        raise UserError(
            f"the training {report['sentence']}. All figures are in preflight.html; to start it all the same, set "
            "preflight.mode to warn"
        )
    if report["verdict"] not in (FITS, OFF, UNKNOWN):
        logger.warning("the training %s", report["sentence"])


def with_chosen_recomputation(train: TrainConfig, report: dict[str, Any]) -> TrainConfig:
    """Put what the preflight has chosen in the place of `gradient_checkpointing: auto`.

    Raises:
        UserError: The preflight is off, and cannot choose.
    """
    if train.gradient_checkpointing != "auto":
        return train
    if report["verdict"] in (OFF, UNKNOWN):
        why = "is off: switch it on" if report["verdict"] == OFF else "cannot foretell what this training needs"
        raise UserError(f"train.gradient_checkpointing 'auto' is chosen by the preflight, which {why}, or set true")
    chosen = GradientCheckpointingConfig(**report["recompute"])
    return train.model_copy(update={"gradient_checkpointing": chosen})


def expected_peak_bytes(report: dict[str, Any]) -> int:
    """Peak of a rank's tensors that was foretold for this machine; 0 where none was."""
    if report["verdict"] in (OFF, UNKNOWN) or not report["hardware"]["this_machine"]:
        return 0
    return int(report["memory"]["tensors_bytes"])

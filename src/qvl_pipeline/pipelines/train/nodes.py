"""The nodes of the `train` stage: look ahead; check the inputs, make the spec, run it, collect the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from qvl_pipeline.config import (
    AdapterConfig,
    BatchingConfig,
    IngestConfig,
    ModelConfig,
    PreflightConfig,
    SampleConfig,
    TrainConfig,
)
from qvl_pipeline.data.base_model import check_prepared
from qvl_pipeline.data.plan.steps import check_plan, make_eval_plan, source_weights
from qvl_pipeline.storage.tables import write_table
from qvl_pipeline.tracking.lineage.base_model import base_model_digest
from qvl_pipeline.tracking.lineage.code import git_tags
from qvl_pipeline.tracking.lineage.digests import content_digest
from qvl_pipeline.training.card.model_card import model_card
from qvl_pipeline.training.checks import check_before_launch
from qvl_pipeline.training.identity import adapter_digest, checkpoint_to_start_from, run_fingerprint, run_identity
from qvl_pipeline.training.processes import training_processes
from qvl_pipeline.training.running import collect, join, run_engine
from qvl_pipeline.training.scratch import CARD, EVAL_PLAN, PACK_PLAN, PARAMETERS, SPEC, held, publish, publish_kept
from qvl_pipeline.training.spec import Inputs, make_spec


def preflight(
    base_model: Path,
    tokenized_samples: Path,
    pack_plan: pd.DataFrame,
    video_frames: Path,
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    adapter: AdapterConfig,
    preflight: PreflightConfig,
) -> tuple[str, dict[str, Any]]:
    """Say what the training needs, and refuse one that cannot fit; node 0 of a job saves the answer.

    Returns:
        The page, and the report.

    Raises:
        UserError: It does not fit, or names parts that the model has not.
    """
    from qvl_pipeline.datasets.another import AnswerOfAnotherNode, PageOfAnotherNode
    from qvl_pipeline.preflight.asking import ask, recorded_trainings, refuse_what_cannot_fit
    from qvl_pipeline.preflight.verdict import Plan
    from qvl_pipeline.reports.preflight_page import render_preflight

    profile, data = base_model.parent.name, base_model.parent.parent.parent
    recorded = recorded_trainings(data / "08_reporting", profile)
    plan = Plan(pack_plan, tokenized_samples, video_frames)
    blocks = sample, model, batching, train, adapter, preflight
    report = ask(plan, *blocks, base_model, recorded)
    page = render_preflight(profile, report)
    print(f"preflight: {report['sentence']}", flush=True)
    refuse_what_cannot_fit(report, preflight)
    if train.launch.nodes().node_rank > 0:
        return PageOfAnotherNode(page), AnswerOfAnotherNode(report)
    return page, report


def train(
    base_model: Path,
    tokenized_samples: Path,
    stream_samples: Path,
    pack_plan: pd.DataFrame,
    plan_summary: dict[str, Any],
    video_frames: Path,
    preflight_report: dict[str, Any],
    sample: SampleConfig,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    adapter: AdapterConfig,
    ingest: IngestConfig,
) -> tuple[Callable[[Path], None], Callable[[Path], None], pd.DataFrame, dict[str, Any]]:
    """Execute the pack plan on this machine's GPUs, or on its CPU when there are none.

    The engine works in `<model folder>/scratch/<fingerprint>`; a run of the very same model, plan and parameters that
    was cut off continues there from its newest checkpoint.

    Returns:
        A writer of the trained model's folder, one of the folder of kept checkpoints, the logged steps, and the result.

    Raises:
        UserError: The plan was made for other parameters, these fit the model in no way, or cannot run here; frames
            are lost; or another process trains the same.
        RankFailedError: A training process failed.
        StoppedOnRequest: A signal asked to stop.
    """
    from qvl_pipeline.media.frames.store import FrameStore
    from qvl_pipeline.preflight.asking import expected_peak_bytes, with_chosen_recomputation

    train = with_chosen_recomputation(train, preflight_report)
    weights = source_weights(ingest)
    check_prepared(base_model, model)
    check_plan(plan_summary, tokenized_samples, stream_samples, batching, weights)
    FrameStore(video_frames).check_shards()
    eval_plan = make_eval_plan(tokenized_samples, batching) if train.eval_strategy != "no" else None

    base_digest = base_model_digest(base_model)
    identity = run_identity(base_digest, model, train, plan_summary["fingerprint"], adapter)
    resume_from, resume = checkpoint_to_start_from(train, identity), train.resume_from_checkpoint != "none"
    contents = [base_digest, content_digest(video_frames), *adapter_digest(adapter)]
    fingerprint = run_fingerprint(sample, model, train, plan_summary, contents, adapter)
    folder = base_model.parent / "scratch" / fingerprint
    spec = make_spec(
        Inputs(base_model, tokenized_samples, stream_samples, video_frames, plan_summary),
        sample=sample,
        model=model,
        batching=batching,
        weights=weights,
        train=train,
        adapter=adapter,
        output_dir=folder,
        identity=identity,
        resume_from=resume_from,
        expected_peak_bytes=expected_peak_bytes(preflight_report),
    )
    processes = training_processes(train, batching)
    kernels = check_before_launch(spec, plan_summary["steps"], processes.per_node * processes.nodes.nnodes)
    print(f"train: attention kernels: {kernels}", flush=True)

    if processes.nodes.node_rank > 0:
        join(folder, processes, resume=resume)
    with held(folder, resume=resume):
        write_table(pa.Table.from_pandas(pack_plan, preserve_index=False), folder / PACK_PLAN)
        if eval_plan is not None:
            write_table(pa.Table.from_pandas(eval_plan, preserve_index=False), folder / EVAL_PLAN)
        spec.save(folder / SPEC)
        run_engine(folder, processes, plan_summary["steps"], train.report_to)

    import mlflow

    active = mlflow.active_run()
    rows, result = collect(folder)
    code = git_tags(Path.cwd())
    name = base_model.parent.name
    facts = {"sample": sample, "model": model, "train": train, "adapter": adapter, "plan_summary": plan_summary}
    blocks = {"sample": sample, "model": model, "batching": batching, "train": train, "adapter": adapter}
    decisive = {block: values.decisive() for block, values in blocks.items()}
    papers = {CARD: model_card(name, **facts, code=code), PARAMETERS: f"{json.dumps(decisive, indent=2)}\n"}
    provenance = {
        "training": fingerprint,
        "plan_fingerprint": plan_summary["fingerprint"],
        "base_model": base_digest,
        "git_commit": code.get("mlflow.source.git.commit"),
        "mlflow_run_id": active.info.run_id if active else None,
    }
    kept = partial(publish_kept, folder, papers, result.get("kept_checkpoints", {}))
    return partial(publish, folder, papers), kept, rows, result | provenance

"""Nodes of the `train` stage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from qvl_pipeline.config import BatchingConfig, IngestConfig, ModelConfig, TrainConfig
from qvl_pipeline.config.launch import Nodes
from qvl_pipeline.data.made_with import check_prepared
from qvl_pipeline.data.plan.steps import make_eval_plan, plan_fingerprint, source_weights
from qvl_pipeline.errors import UserError
from qvl_pipeline.tracking.lineage.base_model import base_model_digest
from qvl_pipeline.tracking.lineage.code import git_tags
from qvl_pipeline.tracking.lineage.digests import content_digest
from qvl_pipeline.tracking.mlflow.sinks import make_sinks
from qvl_pipeline.tracking.mlflow.unsent import keep_unsent, only_sender
from qvl_pipeline.training.checks import check_before_launch
from qvl_pipeline.training.launcher import Processes, check_gpus, launch
from qvl_pipeline.training.progress import training_progress
from qvl_pipeline.training.resuming import checkpoint_to_start_from, run_identity
from qvl_pipeline.training.spec import make_spec, run_fingerprint

PUBLISHED = "PUBLISHED"
# Columns of the metrics that hold more than one number; trackers get them number by number.
_NESTED = ("loss_by_source", "learning_rates", "eval_loss_by_source")


def train(
    base_model: Path,
    tokenized_samples: Path,
    stream_samples: Path,
    pack_plan: pd.DataFrame,
    plan_summary: dict[str, Any],
    video_frames: Path,
    model: ModelConfig,
    batching: BatchingConfig,
    train: TrainConfig,
    ingest: IngestConfig,
) -> tuple[Callable[[Path], None], pd.DataFrame, dict[str, Any]]:
    """Execute the pack plan on this machine's GPUs, or on its CPU when there are none.

    The engine works in `<model folder>/scratch/<fingerprint>`; a run of the very same model, plan and parameters that
    was cut off continues there from its newest checkpoint.

    Returns:
        A writer of the trained model's folder, the logged steps, and the result.

    Raises:
        UserError: The plan was made for other parameters, these fit the model in no way, or cannot run here; or another
            process trains the same.
        RankFailedError: A training process failed.
        StoppedOnRequest: A signal asked to stop.
    """
    planned = [tokenized_samples, stream_samples] if batching.streamed else [tokenized_samples]
    _check_inputs(base_model, planned, plan_summary, model, batching, ingest)
    identity = run_identity(base_model_digest(base_model), model, train, plan_summary["fingerprint"])
    resume_from = checkpoint_to_start_from(train, identity)
    fingerprint = run_fingerprint(model, train, plan_summary, [identity["base_model"], content_digest(video_frames)])
    output_dir = base_model.parent / "scratch" / fingerprint
    plan_path, spec_path = output_dir / "pack_plan.parquet", output_dir / "train_spec.json"
    eval_plan = make_eval_plan(tokenized_samples, batching) if train.eval_strategy != "no" else None
    eval_plan_path = output_dir / "eval_plan.parquet"
    spec = make_spec(
        base_model=base_model,
        tokenized_samples=tokenized_samples,
        stream_samples=stream_samples,
        pack_plan=plan_path,
        video_frames=video_frames,
        plan_summary=plan_summary,
        model=model,
        batching=batching,
        weights=source_weights(ingest),
        train=train,
        output_dir=output_dir,
        eval_plan=None if eval_plan is None else eval_plan_path,
        identity=identity,
        resume_from=resume_from,
    )
    nodes = train.launch.nodes()
    ranks = _processes(nodes, train, batching).per_node * nodes.nnodes
    text, vision = check_before_launch(spec, plan_summary["steps"], ranks)
    print(f"train: attention kernels: {text} in the language model, {vision} in the vision tower", flush=True)
    if nodes.node_rank > 0:
        _assist(output_dir, nodes, train, batching)
    metrics_path = output_dir / "metrics.jsonl"
    with _prepared(output_dir, resume=train.resume_from_checkpoint != "none"):
        pack_plan.to_parquet(plan_path, index=False)
        if eval_plan is not None:
            eval_plan.to_parquet(eval_plan_path, index=False)
        spec.save(spec_path)
        if not (output_dir / "result.json").exists():  # else trained to the end, but cut off before it was published
            _run(spec_path, metrics_path, nodes, train, batching, plan_summary["steps"])
    rows = pd.read_json(metrics_path, lines=True)
    rows = rows.drop(columns=[name for name in _NESTED if name in rows])
    import mlflow

    active = mlflow.active_run()
    # From the rows, which are those of all legs of a training that was cut off and resumed.
    train_time_s = float((rows["tokens"] / rows["tokens_per_second"]).sum())
    result = json.loads((output_dir / "result.json").read_text()) | {
        "final_loss": _final_loss(rows),
        "train_time_s": train_time_s,
        "tokens_per_second": float(rows["tokens"].sum()) / train_time_s,
        "plan_fingerprint": plan_summary["fingerprint"],
        "base_model": identity["base_model"],
        "git_commit": git_tags(Path.cwd()).get("mlflow.source.git.commit"),
        "mlflow_run_id": active.info.run_id if active else None,
    }
    return lambda folder: _publish(output_dir, folder), rows, result


def _final_loss(rows: pd.DataFrame) -> float | None:
    """Return the loss of the last row that has one: samples that are skipped have none."""
    losses = rows["loss"].dropna()
    return float(losses.iloc[-1]) if len(losses) else None


def _check_inputs(
    base_model: Path,
    planned: Sequence[Path],
    plan_summary: dict[str, Any],
    model: ModelConfig,
    batching: BatchingConfig,
    ingest: IngestConfig,
) -> None:
    """Refuse what was prepared for other parameters or other data than this run's."""
    check_prepared(base_model, model)
    if plan_fingerprint(planned, batching, source_weights(ingest)) != plan_summary["fingerprint"]:
        raise UserError(
            "the pack plan was made for other data or other `batching` parameters than this run's: "
            "run `kedro run --pipelines tokenize` (with the same --env and --params) to make it anew"
        )


@contextlib.contextmanager
def _prepared(output_dir: Path, *, resume: bool) -> Iterator[None]:
    """Hold the scratch folder; a published run, or one that must not be resumed, starts afresh in it.

    Raises:
        UserError: Another process trains there. Nothing of it was touched.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with only_sender(output_dir):
        _make_ready(output_dir, resume=resume)
        yield


def _make_ready(output_dir: Path, *, resume: bool) -> None:
    from qvl_pipeline.engine.run.checkpoints import completed
    from qvl_pipeline.engine.run.metrics import keep_rows_until
    from qvl_pipeline.engine.run.stopping import STOPPED

    keep_unsent(output_dir)
    if not resume or (output_dir / PUBLISHED).exists():
        for left_behind in output_dir.iterdir():  # not the folder itself, which is held
            if left_behind.is_dir():
                shutil.rmtree(left_behind, ignore_errors=True)
            elif not left_behind.match("engine.node*.log"):  # of nodes that may have joined already
                left_behind.unlink()
    shutil.rmtree(output_dir / "errors", ignore_errors=True)
    (output_dir / STOPPED).unlink(missing_ok=True)
    done = max((step for step, _ in completed(output_dir / "checkpoints")), default=0)
    if done:
        print(f"train: continuing after step {done}, the newest checkpoint of this very run", flush=True)
    # Here and not only in the engine: trackers must not see rows that are about to be written again.
    keep_rows_until(output_dir / "metrics.jsonl", done)


def _assist(output_dir: Path, nodes: Nodes, train: TrainConfig, batching: BatchingConfig) -> NoReturn:
    """Run this node's processes of a job whose results are node 0's to write, then leave with status 0.

    All nodes see the same `output_dir`. Node 0 makes it ready, and does so before its torchrun lets the job start.
    Until then it may hold a training that ended before: node 0 starts afresh there, unless it has but to publish it.
    """
    afresh = train.resume_from_checkpoint == "none" or (output_dir / PUBLISHED).exists()
    if afresh or not (output_dir / "result.json").exists():
        print(f"train: node {nodes.node_rank} of {nodes.nnodes} joins node 0 at {nodes.endpoint}", flush=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        launch(output_dir / "train_spec.json", _processes(nodes, train, batching), lambda: None)
    raise SystemExit(0)


def _run(
    spec_path: Path, metrics_path: Path, nodes: Nodes, train: TrainConfig, batching: BatchingConfig, steps: int
) -> None:
    from qvl_pipeline.tracking.mlflow.run import log_json_file

    log_json_file(spec_path)
    sinks = make_sinks(train.report_to, metrics_path, run_name=spec_path.parents[2].name)
    processes = _processes(nodes, train, batching)
    where = f" on each of {nodes.nnodes} nodes" if nodes.nnodes > 1 else ""
    log_path = spec_path.with_name("engine.log")
    print(f"train: {steps} steps on {processes.per_node} processes{where}; log: {log_path}", flush=True)
    with training_progress(metrics_path, steps) as update:

        def poll() -> None:
            update()
            for sink in sinks:
                sink.poll()

        try:
            launch(spec_path, processes, poll)
        finally:
            for sink in sinks:
                sink.close()


def _processes(nodes: Nodes, train: TrainConfig, batching: BatchingConfig) -> Processes:
    """Processes of this node: as many as asked for, else one a GPU, else its share of what the declared batch needs.

    Raises:
        UserError: More are asked for than there are GPUs.
    """
    given, key = train.nproc_per_node, "train.nproc_per_node"
    if given == "auto" and "PET_NPROC_PER_NODE" in os.environ:
        key = "PET_NPROC_PER_NODE"
        given = os.environ[key]  # Kubeflow may say `auto` or `gpu` too
    if not str(given).isdigit():
        import torch

        given = torch.cuda.device_count()
        given = given or max(1, batching.data_parallel_size * train.sp_ulysses_degree // nodes.nnodes)
    check_gpus(int(given), key)
    return Processes(int(given), nodes, train.launch.max_restarts)


def _publish(output_dir: Path, folder: Path) -> None:
    """Copy the export to its place, then drop what only an unfinished training needs: it is several times the model."""
    shutil.copytree(output_dir / "export", folder)
    (output_dir / PUBLISHED).touch()
    shutil.rmtree(output_dir / "export")
    shutil.rmtree(output_dir / "checkpoints")

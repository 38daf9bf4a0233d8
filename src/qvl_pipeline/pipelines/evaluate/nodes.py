"""Nodes of the `evaluate` stage. What imports torch is imported in the nodes: other stages need not wait for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from qvl_pipeline.config import EvaluateConfig, ModelConfig
from qvl_pipeline.data.base_model import check_prepared, read_base_model
from qvl_pipeline.data.progress import progress_bar
from qvl_pipeline.engine.model.adapters import FOLDER as ADAPTER
from qvl_pipeline.errors import UserError
from qvl_pipeline.evaluation.gate import regressions
from qvl_pipeline.evaluation.metrics import LOSSES, average_scores, check_answered, slices
from qvl_pipeline.evaluation.predictions import prediction_table
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.tracking.lineage.base_model import base_model_digest
from qvl_pipeline.training.card.model_card import with_scores
from qvl_pipeline.training.processes import processes_per_node
from qvl_pipeline.training.scratch import CARD, PARAMETERS


def generate(
    base_model: Path,
    trained_model: Path,
    kept_checkpoints: Path,
    tokenized_samples: Path,
    sampled_samples: pd.DataFrame,
    video_frames: Path,
    plan_summary: dict[str, Any],
    train_result: dict[str, Any],
    model: ModelConfig,
    evaluate: EvaluateConfig,
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """Let the base and the trained model answer the eval split, and score both.

    Args:
        base_model: Folder with the manifest of the base model.
        trained_model: Folder of the trained model and its processor. Where it has an adapter, both models are one copy
            of the base, with and without it.
        kept_checkpoints: Folder of models of earlier steps, of which `evaluate` may name one or several instead.
        tokenized_samples: Arrow file of the samples.
        sampled_samples: Their conversations and media, which servers are sent.
        video_frames: Folder of the frame store.
        plan_summary: Facts of the plan that belongs to the tokenized samples.
        train_result: What training ended with.
        model: Parameters of the model.
        evaluate: Parameters of the stage.

    Returns:
        The predictions, one row for every evaluated sample, the metrics by kind, and those by source and prompt length.
        Without `compare_base` the base model's columns are null, and the metrics do not have it. Of what a server
        answered, there are no losses.

    Raises:
        UserError: There is nothing to evaluate, a checkpoint is not there, a sample has a task without a metric, the
            model was trained on other tokens than these or from another base model than it is to be compared with,
            the tokens were made with other parameters of the model, or a server does not answer.
    """
    from transformers import AutoProcessor

    from qvl_pipeline.evaluation.answering import Answering, answer_all
    from qvl_pipeline.evaluation.checkpoints import chosen_model
    from qvl_pipeline.evaluation.checks import checked_samples
    from qvl_pipeline.evaluation.likelihood import supervised_tokens
    from qvl_pipeline.evaluation.questions import last_question
    from qvl_pipeline.evaluation.servers.models import Asked, ask_servers, forget_answers, served_models
    from qvl_pipeline.media.frames.store import FrameStore

    check_prepared(base_model, model)
    if train_result["plan_fingerprint"] != plan_summary["fingerprint"]:
        raise UserError(
            "the trained model belongs to another pack plan than the tokenized samples, which were made anew since: "
            "run `kedro run --pipelines train` (with the same --env) first"
        )
    scratch = base_model.parent / "scratch"
    trained_model = chosen_model(
        trained_model, kept_checkpoints, evaluate.checkpoint, evaluate.average, scratch / "average"
    )
    adapter = trained_model / ADAPTER
    needs_base = evaluate.compare_base or adapter.is_dir()
    if needs_base and train_result.get("base_model") not in (None, base_model_digest(base_model)):
        otherwise = "" if adapter.is_dir() else ", or set evaluate.compare_base to false"
        raise UserError(
            "the base model was replaced since the model was trained from it: put it back, or run `kedro run "
            f"--pipelines train` (with the same --env){otherwise}"
        )
    FrameStore(video_frames).check_shards()
    chosen = checked_samples(tokenized_samples, evaluate)
    samples = TokenizedSamples(tokenized_samples)
    rows = chosen.index.tolist()
    processor = AutoProcessor.from_pretrained(trained_model)
    base = read_base_model(base_model).path
    paths = {"base": base} if evaluate.compare_base else {}
    served = served_models(evaluate)
    models = {**paths, "trained": base if adapter.is_dir() else str(trained_model)}
    asked = Answering(
        models={name: path for name, path in models.items() if name not in served},
        adapters={"trained": str(adapter)} if adapter.is_dir() else {},
        processor=str(trained_model),
        tokenized=str(tokenized_samples),
        video_frames=str(video_frames),
        rows=tuple(rows),
        attn_implementation=model.attn_implementation,
        evaluate=evaluate,
    )
    of_servers = Asked(
        evaluate=evaluate,
        family=model.family.name,
        processor=processor,
        trained=trained_model,
        base=base,
        tokenized=tokenized_samples,
        sampled=sampled_samples,
        video_frames=video_frames,
        rows=tuple(rows),
        scratch=scratch / "served",
    )
    with progress_bar() as bar:
        total = len(rows) * (2 * len(asked.models) + len(served))
        advance = partial(bar.advance, bar.add_task("answers and losses", total=total))
        # Of servers first: where one is launched, no model is on the GPUs yet.
        said = ask_servers(of_servers, advance)
        processes = processes_per_node(evaluate.nproc_per_node, "evaluate.nproc_per_node", without_gpus=1)
        found = answer_all(asked, scratch / "evaluation", processes, advance) if asked.models else {}
    answers: dict[str, list[str | None]] = {name: [by_row[row][0] for row in rows] for name, by_row in found.items()}
    answers |= {name: [each.text(row) for row in rows] for name, each in said.items()}
    losses = {name: [by_row[row][1] for row in rows] for name, by_row in found.items()}
    questions = [last_question(processor.tokenizer, samples.row(row)) for row in rows]
    table = prediction_table(chosen, questions, answers, losses, [supervised_tokens(samples.row(row)) for row in rows])
    for name, each in said.items():
        table[f"{name}_failure"] = pd.Series([each.failures.get(row) for row in rows], dtype="string")
    check_answered(table, list(answers))
    metrics = {name: average_scores(table, name) for name in answers}
    forget_answers(of_servers)
    Console().print(_score_table(metrics))
    return table, metrics, {name: slices(table, name) for name in answers}


def _score_table(metrics: dict[str, Any]) -> Table:
    """Return the scores of every kind by metric, and its loss, of each model; it fits 80 columns."""
    table = Table(
        Column("kind", overflow="fold"), "metric", "n", *chain.from_iterable([name, "loss"] for name in metrics)
    )
    for kind, scores in next(iter(metrics.values())).items():
        for metric in (name for name in scores if name not in ("n", *LOSSES)):
            losses = (model[kind].get("loss") for model in metrics.values())
            shown = ("" if loss is None else f"{loss:.3f}" for loss in losses)
            cells = [[f"{model[kind][metric]:.1%}", loss] for model, loss in zip(metrics.values(), shown, strict=True)]
            table.add_row(kind, metric, str(scores["n"]), *chain.from_iterable(cells))
    return table


def measure(
    base_model: Path,
    trained_model: Path,
    kept_checkpoints: Path,
    metrics: dict[str, Any],
    model: ModelConfig,
    evaluate: EvaluateConfig,
) -> dict[str, Any]:
    """Let lmms-eval measure the models that were evaluated, where it is asked to.

    Args:
        base_model: Folder with the manifest of the base model.
        trained_model: Folder of the trained model.
        kept_checkpoints: Folder of models of earlier steps, of which `evaluate` may name one or several instead.
        metrics: Metrics of the evaluated models, which are thereby written first.
        model: Parameters of the model.
        evaluate: Parameters of the stage.

    Returns:
        `{model: {"lmms_eval/<task>": {metric: score, "n": samples}}}` of the models in `metrics`; without tasks, `{}`.

    Raises:
        UserError: lmms-eval is not installed, or failed.
    """
    from qvl_pipeline.evaluation.benchmarks.harness import run_lmms_eval
    from qvl_pipeline.evaluation.checkpoints import chosen_model

    if not evaluate.lmms_eval:
        return {}
    scratch = base_model.parent / "scratch"
    chosen = chosen_model(trained_model, kept_checkpoints, evaluate.checkpoint, evaluate.average, scratch / "average")
    paths = {"base": read_base_model(base_model).path, "trained": str(chosen)}
    limits = {"min_pixels": model.image_min_pixels, "max_pixels": model.image_max_pixels}
    given = (model.processor_type, evaluate.lmms_eval, limits | evaluate.lmms_eval_model_args)
    found = {
        name: run_lmms_eval(path, *given, scratch / "lmms_eval" / name)
        for name, path in paths.items()
        if name in metrics
    }
    return {name: {f"lmms_eval/{task}": scores for task, scores in tasks.items()} for name, tasks in found.items()}


def complete_card(trained_model: Path, metrics: dict[str, Any]) -> str:
    """Complete the model's card by its scores.

    A card of its own, not a change of the trained model's: that is the output of another stage, whose hash DVC knows.

    Args:
        trained_model: Folder of the trained model and its card.
        metrics: Metrics of the evaluated models.

    Returns:
        Markdown.
    """
    return with_scores((trained_model / CARD).read_text(encoding="utf-8"), metrics)


def refuse_regressions(
    metrics: dict[str, Any], predictions: pd.DataFrame, report: str, evaluate: EvaluateConfig
) -> None:
    """Fail when the trained model is worse than the base model by more than `must_not_regress` allows.

    Args:
        metrics: Metrics of the evaluated models.
        predictions: Their predictions.
        report: The report, which is thereby written first.
        evaluate: Parameters of the stage.

    Raises:
        UserError: Some score is; the table of them is printed.
    """
    worse = regressions(metrics, predictions, evaluate.must_not_regress, evaluate.must_not_regress_by)
    if not worse:
        return
    table = Table(Column("kind", overflow="fold"), "metric", "base", "trained", "allowed drop", "95 % interval")
    for row in worse:
        figures = (f"{row[key]:.1%}" for key in ("base", "trained", "allowed_drop"))
        interval = "" if row["low"] is None else f"{row['low']:+.1%} to {row['high']:+.1%}"
        table.add_row(row["kind"], row["metric"], *figures, interval)
    Console().print(table)
    names = ", ".join(f"{row['metric']} of {row['kind']}" for row in worse)
    raise UserError(
        f"the trained model is worse than the base model in {names}, more than evaluate.must_not_regress allows; "
        "the model and its report are kept: train it better, or allow the drop"
    )


def write_report(
    metrics: dict[str, Any],
    lmms_eval_results: dict[str, Any],
    predictions: pd.DataFrame,
    training_metrics: pd.DataFrame,
    train_result: dict[str, Any],
    plan_summary: dict[str, Any],
    validation_report: dict[str, Any],
    tokenized_samples: Path,
    video_frames: Path,
    evaluation_slices: dict[str, Any],
    trained_model: Path,
    model: ModelConfig,
    evaluate: EvaluateConfig,
) -> str:
    """Write the report page.

    Args:
        metrics: Metrics of the evaluated models.
        lmms_eval_results: What lmms-eval measured of them.
        predictions: Predictions of the evaluated models.
        training_metrics: One row for every logged step.
        train_result: What training ended with.
        plan_summary: What the plan amounts to.
        validation_report: Counts of rows and of broken rules.
        tokenized_samples: Arrow file of the samples, for their media.
        video_frames: Folder of the frame store.
        evaluation_slices: Metrics by source and by prompt length.
        trained_model: Folder of the trained model, for the parameters that it was trained with.
        model: Parameters of the model.
        evaluate: Parameters of the stage.

    Returns:
        HTML.
    """
    from qvl_pipeline.reports.evaluation.report import render_report
    from qvl_pipeline.reports.thumbnails import MediaThumbnails

    recorded, name = trained_model / PARAMETERS, model.family.title
    origin = model.load_from_pretrained_path or f"a tiny {name} with random weights (seed {model.tiny_seed})"
    return render_report(
        title=evaluate.report_title or name,
        subtitle=f"{name}, trained from {origin}"
        + (f"; evaluated: {evaluate.evaluated}" if evaluate.evaluated != "trained" else ""),
        metrics=metrics,
        predictions=predictions,
        slices=evaluation_slices,
        training_metrics=training_metrics,
        train_result=train_result,
        plan_summary=plan_summary,
        validation_report=validation_report,
        validation_page=f"../{evaluate.dataset}/validation.html" if evaluate.dataset else None,
        media=MediaThumbnails(TokenizedSamples(tokenized_samples), video_frames),
        measured=lmms_eval_results,
        # A model that was trained before they were kept has none.
        parameters=json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else {},
        samples_page="samples/index.html" if evaluate.browsed_samples else None,
    )


def write_samples(
    predictions: pd.DataFrame, tokenized_samples: Path, video_frames: Path, model: ModelConfig, evaluate: EvaluateConfig
) -> Callable[[Path], None]:
    """Write the page of samples to browse.

    Args:
        predictions: Predictions of the evaluated models.
        tokenized_samples: Arrow file of the samples, for their media.
        video_frames: Folder of the frame store.
        model: Parameters of the model.
        evaluate: Parameters of the stage.

    Returns:
        A writer of the folder of the page.
    """
    from qvl_pipeline.reports.evaluation.samples_page import write_samples_page
    from qvl_pipeline.reports.thumbnails import MediaThumbnails

    return partial(
        write_samples_page,
        title=evaluate.report_title or model.family.title,
        predictions=predictions,
        media=MediaThumbnails(TokenizedSamples(tokenized_samples), video_frames),
        most=evaluate.browsed_samples,
    )

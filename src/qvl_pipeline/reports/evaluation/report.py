"""The evaluation report: one self-contained HTML page, the same bytes for the same inputs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qvl_pipeline.intervals import score
from qvl_pipeline.kinds import BENCHMARK, OVERALL, rows_of
from qvl_pipeline.reports.chosen import chosen_parameters
from qvl_pipeline.reports.evaluation.answers import Media, confusion, gallery
from qvl_pipeline.reports.evaluation.headline import evaluation_notes, headline_tiles
from qvl_pipeline.reports.page import count, percent, points, render
from qvl_pipeline.reports.plots import WIDTH, training_curves

NOT_SCORES = ("loss", "perplexity", "n")
_LOSS_FORMS = {"loss": ".3f", "perplexity": ".3g"}


def render_report(
    *,
    title: str,
    subtitle: str,
    metrics: dict[str, Any],
    predictions: pd.DataFrame,
    training_metrics: pd.DataFrame,
    train_result: dict[str, Any],
    plan_summary: dict[str, Any],
    validation_report: dict[str, Any],
    validation_page: str | None,
    slices: dict[str, Any],
    media: Media,
    parameters: dict[str, Any],
    samples_page: str | None,
    measured: dict[str, Any] | None = None,
) -> str:
    """Write the page.

    It makes no request to anywhere, follows the reader's light or dark setting, and shows text of the data escaped.

    Args:
        title: Heading.
        subtitle: One line below the heading.
        metrics: `trained` and, when the base model was evaluated, `base`: `{kind: {metric: score, loss,
            perplexity, n}}` with `overall`.
        predictions: One row for every evaluated sample.
        training_metrics: One row for every logged step.
        train_result: What training ended with.
        plan_summary: Steps, packs, tokens and fill of the plan.
        validation_report: Counts of rows, and of every rule that was broken.
        validation_page: Address of the page that shows these rows, relative to the report.
        slices: Metrics by `source` and by `prompt_length`, of each model.
        media: Pictures of a sample, by its `sample_id`: one list of thumbnails for every image or clip.
        parameters: What the model was trained with, block by block; empty when it was not kept.
        samples_page: Address of the page on which all of the samples can be browsed, relative to the report.
        measured: What lmms-eval measured of these models: `{model: {task: {metric: score, n}}}`.

    Returns:
        HTML.
    """
    notes = evaluation_notes(predictions)
    predictions = predictions[predictions["trained_answer"].notna()]  # a server may have left out some
    kinds = _kind_rows(metrics, predictions)
    return render(
        "report",
        title=title,
        subtitle=subtitle,
        compared="base" in metrics,
        others=[name for name in metrics if name not in ("trained", "base")],
        notes=notes,
        tiles=[*headline_tiles(kinds, metrics, rows_of(predictions, OVERALL)), _time_tile(train_result)],
        kinds=kinds,
        benchmarks=any(row["kind"].startswith(BENCHMARK) for row in kinds),
        slices=_slice_rows(slices),
        measured=_measured_rows(measured or {}),
        curves=training_curves(training_metrics),
        plot_width=WIDTH,
        training=_training_facts(train_result, plan_summary, training_metrics),
        counts=validation_report["counts"],
        rules=_broken_rules(validation_report["rules"]),
        validation_page=validation_page,
        parameters=chosen_parameters(parameters),
        confusion=confusion(predictions),
        gallery=gallery(predictions, media),
        samples_page=samples_page,
        provenance=_provenance(train_result, plan_summary),
    )


def _kind_rows(metrics: dict[str, Any], predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """One row for every sample kind and metric; those of all samples last."""
    rows = []
    for kind in [*sorted(set(metrics["trained"]) - {OVERALL}), OVERALL]:
        of_kind = rows_of(predictions, kind)
        for metric in (name for name in metrics["trained"][kind] if name not in NOT_SCORES):
            answers = of_kind[of_kind["task"] == metric]
            row: dict[str, Any] = {"kind": "all samples" if kind == OVERALL else kind, "metric": metric, "base": None}
            row["total"] = kind == OVERALL
            for model, values in metrics.items():
                scores = answers[f"{model}_score"].astype(float).dropna()
                row[model] = score(values[kind][metric], scores.to_numpy())
            if row["base"]:
                row["gain"] = points(row["trained"].rate - row["base"].rate)
            rows.append(row)
    return rows


def _slice_rows(slices: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every source and every quarter of the prompt lengths: losses, and scores as text."""
    titles = {"source": "source", "prompt_length": "prompt tokens"}
    rows = []
    for dimension, groups in slices["trained"].items():
        for name, trained in groups.items():
            row = {"dimension": titles[dimension], "name": name, "n": trained["n"], "base": None}
            for model, values in slices.items():
                entry = values[dimension][name]
                scores = ", ".join(f"{key} {percent(entry[key])}" for key in entry if key not in NOT_SCORES)
                # What a server answered has no losses.
                figures = {key: format(entry[key], form) if key in entry else "" for key, form in _LOSS_FORMS.items()}
                row[model] = {"scores": scores, **figures}
            rows.append(row)
    return rows


def _measured_rows(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every score that lmms-eval gave, with its standard error where it has one; scales are lmms-eval's."""
    rows = []
    for task, trained in measured.get("trained", {}).items():
        for metric in (name for name in trained if name != "n" and not name.endswith("_stderr")):
            row = {"task": task.removeprefix("lmms_eval/"), "metric": metric, "n": trained.get("n"), "base": None}
            for model, tasks in measured.items():
                error = tasks[task].get(f"{metric}_stderr")
                row[model] = f"{tasks[task][metric]:.4g}" + (f" ± {error:.2g}" if error is not None else "")
            rows.append(row)
    return rows


def _time_tile(train_result: dict[str, Any]) -> dict[str, str]:
    steps, ranks = train_result["steps"], train_result["world_size"]
    return {
        "role": "time",
        "name": "Training time",
        "value": _duration(train_result["train_time_s"]),
        "detail": f"{count(steps)} steps on {ranks} {'rank' if ranks == 1 else 'ranks'}, {train_result['device']}",
    }


def _training_facts(
    result: dict[str, Any], plan: dict[str, Any], training_metrics: pd.DataFrame
) -> list[tuple[str, str]]:
    # Of a stream, only the training itself knows how many passes it made and how full its packs were.
    epochs = plan["epochs"] or training_metrics["epoch"].iloc[-1]
    fill = plan["fill"] or result["tokens"] / (plan["packs"] * plan["packing_length"])
    left_out = len(plan["overlong"]) if plan["epochs"] else result["skipped_samples"]
    facts = [
        ("Optimizer steps", count(result["steps"])),
        ("Passes over the data", f"{epochs:g}"),
        ("Samples in the plan", count(plan["samples"])),
        ("Packs", count(plan["packs"])),
        ("Pack length, tokens", count(plan["packing_length"])),
        ("Packs filled to", percent(fill)),
        ("Over-long samples left out" if plan["epochs"] else "Samples left out", count(left_out)),
        ("Tokens", count(result["tokens"])),
        ("Tokens trained on", count(result["supervised_tokens"])),
        ("Tokens per second", count(result["tokens_per_second"])),
        ("Final loss", f"{result['final_loss']:.4g}"),
    ]
    if len(training_metrics):
        facts.append(("Waiting for data", percent(training_metrics["data_wait_share"].mean())))
        facts.append(("Peak memory, GiB", f"{training_metrics['peak_memory_gib'].max():.2f}"))
    return facts


def _broken_rules(rules: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((rule, n) for rule, n in rules.items() if n), key=lambda item: (-item[1], item[0]))


def _provenance(result: dict[str, Any], plan: dict[str, Any]) -> list[tuple[str, str]]:
    facts = {
        "Git commit": result.get("git_commit"),
        "Plan fingerprint": result.get("plan_fingerprint") or plan.get("fingerprint"),
        "MLflow run": result.get("mlflow_run_id"),
    }
    return [(name, value) for name, value in facts.items() if value]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (value, _) in enumerate(parts) if value), 2)
    return "\N{NO-BREAK SPACE}".join(f"{value} {unit}" for value, unit in parts[first : first + 2])

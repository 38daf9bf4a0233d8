"""The model card of a trained model: what it is, what it saw, and how to serve it so that it sees the same again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qvl_pipeline.config import AdapterConfig, ModelConfig, SampleConfig, TrainConfig
from qvl_pipeline.config.training.adapter import NO_ADAPTER
from qvl_pipeline.families import FAMILIES


def model_card(
    name: str,
    *,
    sample: SampleConfig,
    model: ModelConfig,
    train: TrainConfig,
    plan_summary: Mapping[str, Any],
    code: Mapping[str, str],
    adapter: AdapterConfig = NO_ADAPTER,
) -> str:
    """Write the card of a model that was just trained.

    Args:
        name: Of the profile.
        sample: How clips were sampled.
        model: The model and the limits of images.
        train: Parameters of training.
        plan_summary: Facts of the plan.
        code: Tags of the commit, as `git_tags` gives them.
        adapter: Parameters of the adapter.

    Returns:
        Markdown, with the front matter that hubs read.
    """
    family, base, item = model.family, model.load_from_pretrained_path, sampling_item(sample)
    return _template().render(
        name=name,
        family=family,
        base=base or f"a tiny model with random weights (seed {model.tiny_seed})",
        base_path=base or "../base",  # where a tiny model is, beside the trained one
        base_is_on_the_hub=bool(base) and not Path(base).exists(),
        adapter=adapter if adapter.type != "none" else None,
        dtype=f" (in {train.export_dtype})",
        sources=plan_summary.get("sources", []),
        steps=plan_summary["steps"],
        plan=plan_summary["fingerprint"],
        commit=code.get("mlflow.source.git.commit"),
        dirty=code.get("git_dirty") == "true",
        image_min_pixels=model.image_min_pixels,
        image_max_pixels=model.image_max_pixels,
        item=item,
        num_frames=item.get("nframes"),
        heard=sample.use_audio_in_video,
        vllm=" \\\n  ".join(["vllm serve .", *(f"{key} '{value}'" for key, value in vllm_options(family.name, item))]),
        sglang=json.dumps({"video": item}),
    )


def sampling_item(sample: SampleConfig) -> dict[str, Any]:
    """Say how clips are sampled in the keys of an item of `qwen_vl_utils`, which SGLang has too."""
    sizes = {
        "min_pixels": sample.video_min_pixels,
        "max_pixels": sample.video_max_pixels,
        "total_pixels": sample.video_total_pixels,
    }
    if sample.video_sampling_strategy == "frame_num":
        return {"nframes": sample.frame_num} | sizes
    return {"fps": sample.fps, "min_frames": sample.video_min_frames, "max_frames": sample.video_max_frames} | sizes


def with_scores(card: str, metrics: Mapping[str, Any]) -> str:
    """Complete a card by the scores of an evaluation.

    Args:
        card: Card of a trained model.
        metrics: Scores by model, kind and metric.

    Returns:
        The card with a table of them.
    """
    kinds = metrics["trained"]
    rows = [
        [kind, metric, scores["n"], *(_figure(models[kind].get(metric)) for models in metrics.values())]
        for kind, scores in kinds.items()
        for metric in scores
        if metric != "n"
    ]
    head = ["kind", "metric", "n", *metrics]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"{card.rstrip()}\n\n## Scores\n\nOf the eval split, by `kedro run --pipelines evaluate`.\n\n{table}\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def vllm_sampling(family: str, item: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Say how clips are sampled in what vLLM knows, of a request or of the server.

    Args:
        family: Of the model.
        item: What `sampling_item` returns.

    Returns:
        `media_io_kwargs` and, where there is something to say, `mm_processor_kwargs`.
    """
    frames = item.get("nframes")
    if FAMILIES[family].limits_are_per_clip:  # a processor that samples clips itself, from all of their frames
        loader: dict[str, Any] = {"num_frames": frames or -1}
    else:
        loader = {"num_frames": frames} if frames else {"num_frames": item["max_frames"], "fps": item["fps"]}
    processor = {} if frames else {"mm_processor_kwargs": {"fps": item["fps"]}}
    return {"media_io_kwargs": {"video": loader}} | processor


def vllm_options(family: str, item: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return these as options of `vllm serve`, each with its value in JSON."""
    return [(f"--{key.replace('_', '-')}", json.dumps(value)) for key, value in vllm_sampling(family, item).items()]


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("model_card.md.j2")

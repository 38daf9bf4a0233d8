"""Answers and losses of several models to the same samples, by one process or shared out over the ranks of a job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedModel

from qvl_pipeline.config import EvaluateConfig
from qvl_pipeline.engine.model.adapters.attach import AttachedAdapter
from qvl_pipeline.evaluation.generation import generate_answers, load_model
from qvl_pipeline.evaluation.likelihood import sample_losses
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.training.launcher import Processes, launch


@dataclass(frozen=True)
class Answering:
    """What is asked of which models.

    Attributes:
        models: Folder or hub id of each model, by name.
        adapters: Folder of the adapter that a model answers with, by name of the model.
        processor: Folder of the processor.
        tokenized: Arrow file of `tokenized_samples`.
        video_frames: Folder of the frame store.
        rows: Rows of `tokenized` to answer.
        attn_implementation: Attention kernel of training.
        evaluate: Parameters of the stage.
    """

    models: dict[str, str]
    processor: str
    tokenized: str
    video_frames: str
    rows: tuple[int, ...]
    attn_implementation: str
    evaluate: EvaluateConfig
    adapters: dict[str, str] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        values = dataclasses.asdict(self) | {"evaluate": self.evaluate.model_dump(mode="json")}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Answering:
        """Read it."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {"rows": tuple(values["rows"]), "evaluate": EvaluateConfig(**values["evaluate"])}
        return cls(**values)


# By model: the answer and the loss (nats a token) of each row.
Answers = dict[str, dict[int, tuple[str, float]]]


def answer_share(asked: Answering, rank: int, world_size: int, on_done: Callable[[int], object]) -> Answers:
    """Answer the share of one rank.

    Rank `r` of `R` takes every `R`-th row in order of prompt length, so that all have about as much to do.

    Args:
        asked: What is asked.
        rank: This rank.
        world_size: Ranks.
        on_done: Called with a number of answers or losses whenever they are done; two a row and model.
    """
    samples = TokenizedSamples(Path(asked.tokenized))
    lengths = samples.columns(["prompt_length"])["prompt_length"].to_pylist()
    rows = sorted(asked.rows, key=lambda row: (lengths[row], row))[rank::world_size]
    if not rows:
        return {name: {} for name in asked.models}
    processor = AutoProcessor.from_pretrained(asked.processor)
    found: Answers = {}
    for name, model in _loaded(asked):
        given = (model, processor, samples, rows, Path(asked.video_frames))
        answers = generate_answers(*given, asked.evaluate, on_batch=on_done)
        losses = sample_losses(*given, asked.evaluate.batch_size, on_batch=on_done)
        found[name] = dict(zip(rows, zip(answers, losses, strict=True), strict=True))
        del model, given  # or this model would stay in memory beside the next one
    return found


def _loaded(asked: Answering) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield each model, one in memory at a time; those that differ by an adapter only are one copy of their base."""
    names = list(asked.models)
    while names:
        path = asked.models[names[0]]
        model = load_model(path, asked.attn_implementation)
        adapter = None
        while names and asked.models[names[0]] == path:
            name = names.pop(0)
            if folder := asked.adapters.get(name):
                adapter = adapter or AttachedAdapter(model, folder)
            if adapter:
                adapter.switch(on=bool(folder))
            yield name, model
        del model, adapter


def answer_all(asked: Answering, folder: Path, nproc: int, on_done: Callable[[int], object]) -> Answers:
    """Answer everything: in this process, or under torchrun when there are several.

    Args:
        asked: What is asked.
        folder: Scratch folder of the job, its log and its errors.
        nproc: Processes.
        on_done: Called with a number of answers or losses whenever they are done; two a row and model.

    Returns:
        Answers and losses of all rows.

    Raises:
        RankFailedError: A process failed.
    """
    if nproc == 1:
        return answer_share(asked, 0, 1, on_done)
    folder.mkdir(parents=True, exist_ok=True)
    for left_behind in folder.glob("rank*"):
        left_behind.unlink()
    asked.save(folder / "answering.json")
    seen = 0

    def poll() -> None:
        nonlocal seen
        done = sum(len(path.read_bytes()) for path in folder.glob("rank*.done"))
        on_done(done - seen)
        seen = done

    launch(folder / "answering.json", Processes(nproc), poll, "qvl_pipeline.evaluation", "evaluation")
    return merge(
        [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(nproc)], asked
    )


def merge(parts: Sequence[dict[str, dict[str, Any]]], asked: Answering) -> Answers:
    """Put the shares of all ranks together.

    Raises:
        ValueError: A row is missing, or was answered twice.
    """
    merged: Answers = {}
    for name in asked.models:
        found = [(int(row), tuple(answer)) for part in parts for row, answer in part[name].items()]
        if sorted(row for row, _ in found) != sorted(asked.rows):
            raise ValueError(f"the ranks did not answer every row once for the model '{name}'")
        merged[name] = dict(found)
    return merged

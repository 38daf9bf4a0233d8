"""Nodes of the `tokenize` stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from qvl_pipeline.config import BatchingConfig, DataEngineConfig, IngestConfig, ModelConfig
from qvl_pipeline.data.base_model import check_family, write_manifest
from qvl_pipeline.data.progress import progress_bar

if TYPE_CHECKING:  # what imports transformers takes long
    from qvl_pipeline.data.plan.tokenization import Tokenized
    from qvl_pipeline.tokens.unusable import Unusable

# Share of the time that ranks would wait for the slowest above which another packing is proposed.
WORTH_BALANCING = 0.05

logger = logging.getLogger(__name__)


def prepare_base_model(valid_samples: pd.DataFrame, model: ModelConfig) -> Callable[[Path], None]:
    """Build the tiny model, or point to the pretrained one.

    Args:
        valid_samples: Samples whose training texts the tiny model's tokenizer is made for.
        model: Parameters of the model.

    Returns:
        A writer of the folder `base_model`.

    Raises:
        UserError: The pretrained model cannot be found, or is of another family.
    """
    if model.load_from_pretrained_path is None:
        train = valid_samples.loc[valid_samples["split"] == "train", "messages"]
        return partial(_write_tiny_model, model=model, corpus=list(_texts(train)))
    check_family(model.load_from_pretrained_path, model.processor_type)
    return partial(_write_pointer, model=model)


def tokenize(
    valid_samples: pd.DataFrame,
    media_index: pd.DataFrame,
    video_frames: Path,
    base_model: Path,
    model: ModelConfig,
    batching: BatchingConfig,
    data_engine: DataEngineConfig,
) -> tuple[Callable[[Path], None], Callable[[Path], None], Callable[[Path], None]]:
    """Tokenise every sample, of the eval split too.

    Of iterable types, training samples are tokenised while training reads them: here only the eval split is, and some
    training samples to be looked at.

    Args:
        valid_samples: Samples that passed validation.
        media_index: Every media file as probed; sizes of images come from here.
        video_frames: Frame store of the sampled clips.
        base_model: Folder with the manifest of the model.
        model: Parameters of the model.
        batching: Whether training is a stream.
        data_engine: Where to work.

    Returns:
        Writers of `tokenized_samples`, of `stream_samples`, which are none for a map-style type, and of
        `tokenize_quarantine`, to be called after the first: the samples that cannot be tokenised.

    Raises:
        UserError: The processor does not fit the model, or counts other tokens than we do; or there is no cluster.
    """
    from qvl_pipeline.data.plan.processor import check_token_counts, load_processor
    from qvl_pipeline.data.plan.stream_samples import tokenized_beforehand, write_stream_samples
    from qvl_pipeline.data.plan.tokenization import media_grids, tokenize_samples, useful_workers
    from qvl_pipeline.data.plan.turns import with_prompts_of_turns
    from qvl_pipeline.data.runner import join_cluster
    from qvl_pipeline.media.frames.store import FrameStore
    from qvl_pipeline.media.sound.store import SoundStore

    join_cluster(data_engine)
    processor, store = load_processor(base_model, model), FrameStore(video_frames)
    last_turn_only = model.thinking == "last_turn_only"
    valid_samples = with_prompts_of_turns(valid_samples, processor, last_turn_only=last_turn_only)
    hearing = model.family.hearing
    sounds = SoundStore(video_frames, hearing) if hearing else None
    grids = media_grids(processor, media_index, store, sounds)
    first_of_type: dict[str, Any] = {}
    for items in valid_samples["media"]:
        for item in items:
            first_of_type.setdefault(item["type"], item)
    check_token_counts(processor, [grids.medium(item) for item in first_of_type.values()], store, sounds)
    streamed, now = valid_samples.iloc[:0], valid_samples
    if batching.streamed:
        streamed, now = valid_samples, tokenized_beforehand(valid_samples)
        print(
            f"tokenize: dataset_type {batching.dataset_type} tokenises while it trains; now {len(now):,} of "
            f"{len(valid_samples):,} samples are: the eval split, and training samples to be looked at",
            flush=True,
        )
    batches = tokenize_samples(
        now,
        grids,
        processor,
        workers=useful_workers(len(now)),
        runner=data_engine.runner,
        ignore_empty_think=model.ignore_empty_think,
    )
    unusable: list[Unusable] = []
    return (
        partial(_write_tokenized, batches=batches, total=len(now), attrs=valid_samples.attrs, unusable=unusable),
        partial(write_stream_samples, samples=streamed, images=grids.images),
        partial(_write_quarantine, samples=now, unusable=unusable),
    )


def plan(
    tokenized_samples: Path,
    stream_samples: Path,
    tokenize_quarantine: pd.DataFrame,
    batching: BatchingConfig,
    ingest: IngestConfig,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Plan every optimizer step, and print what the plan comes to.

    Args:
        tokenized_samples: File of the tokenized samples.
        stream_samples: File of the samples of a stream.
        tokenize_quarantine: Samples that cannot be tokenised.
        batching: Parameters of the plan.
        ingest: Declared sources with their weights.

    Returns:
        The tables `pack_plan` and `plan_summary`.

    Raises:
        UserError: There is nothing to train on, a sample is over-long and may not be left out, or too many samples are
            left out.
    """
    from qvl_pipeline.data.plan.left_out import count_left_out
    from qvl_pipeline.data.plan.steps import make_plan, plan_stream, source_weights
    from qvl_pipeline.data.plan.token_statistics import source_table
    from qvl_pipeline.data.plan.turns import divided_conversations

    weights = source_weights(ingest)
    if batching.streamed:
        pack_plan, summary = plan_stream(stream_samples, tokenized_samples, batching, weights)
    else:
        pack_plan, summary = make_plan(tokenized_samples, batching, weights)
    summary["sources"] = source_table(tokenized_samples, summary["overlong"], weights)
    summary["divided"] = divided_conversations(_sample_ids(stream_samples if batching.streamed else tokenized_samples))
    summary["quarantined"] = tokenize_quarantine["rule"].value_counts().sort_index().to_dict()
    _print_summary(summary, batching)
    _print_sources(summary["sources"])
    _check_eval_split(tokenized_samples)
    if left_out := count_left_out(tokenized_samples, tokenize_quarantine, summary["overlong"], batching):
        left_out.check(batching)
        logger.warning(left_out.sentence)
    return pack_plan, summary


def preview(
    tokenized_samples: Path,
    plan_summary: dict[str, Any],
    base_model: Path,
    video_frames: Path,
    model: ModelConfig,
) -> tuple[dict[str, Any], str]:
    """Show what is trained on, before it is.

    Args:
        tokenized_samples: File of the tokenized samples.
        plan_summary: What the plan amounts to.
        base_model: Folder with the manifest of the model.
        video_frames: Folder of the frame store.
        model: Parameters of the model.

    Returns:
        `token_statistics`, and the page `label_preview` as HTML.
    """
    from qvl_pipeline.data.plan.processor import load_processor
    from qvl_pipeline.data.plan.token_statistics import token_statistics
    from qvl_pipeline.media.arrow_rows import TokenizedSamples
    from qvl_pipeline.reports.label_preview import render_label_preview
    from qvl_pipeline.reports.thumbnails import MediaThumbnails

    statistics, samples = token_statistics(tokenized_samples), TokenizedSamples(tokenized_samples)
    page = render_label_preview(
        model_name=model.load_from_pretrained_path or f"a tiny {model.processor_type}",
        samples=samples,
        processor=load_processor(base_model, model),
        statistics=statistics,
        plan_summary=plan_summary,
        pictures=MediaThumbnails(samples, video_frames).pictures,
    )
    return statistics, page


def _sample_ids(path: Path) -> list[str]:
    """Return the ids in a file of `stream_samples` or `tokenized_samples`, in order."""
    from qvl_pipeline.media.arrow_rows import TokenizedSamples

    if path.suffix == ".parquet":
        return pq.read_table(path, columns=["sample_id"])["sample_id"].to_pylist()
    return TokenizedSamples(path).columns(["sample_id"])["sample_id"].to_pylist()


def _check_eval_split(tokenized_samples: Path) -> None:
    """Say before training, not after it, that there will be nothing to evaluate, not even a benchmark."""
    from qvl_pipeline.media.arrow_rows import TokenizedSamples

    if TokenizedSamples(tokenized_samples).columns(["split"])["split"].unique().to_pylist() == ["train"]:
        logger.warning(
            "no sample is in the split 'eval', so the pipeline 'evaluate' will refuse to run: give a source "
            "'split: eval', its rows a column 'split', or set ingest.eval_fraction"
        )


def _write_tokenized(
    path: Path, *, batches: Iterator[Tokenized], total: int, attrs: dict[str, Any], unusable: list[Unusable]
) -> None:
    from qvl_pipeline.data.made_with import with_attrs
    from qvl_pipeline.data.plan.tokenization import SCHEMA
    from qvl_pipeline.storage.batches import write_checked

    with progress_bar() as bar, pa.ipc.new_file(str(path), with_attrs(SCHEMA, attrs)) as writer:
        task = bar.add_task("Samples", total=total)
        for number, (rows, left_out) in enumerate(batches):
            write_checked(writer, rows, number)
            unusable += left_out
            bar.advance(task, rows.num_rows + len(left_out))


def _write_quarantine(path: Path, *, samples: pd.DataFrame, unusable: list[Unusable]) -> None:
    from qvl_pipeline.data.plan.tokenization import quarantine_table
    from qvl_pipeline.storage.tables import write_table

    for rule, count in Counter(sample.rule for sample in unusable).items():
        first = next(sample for sample in unusable if sample.rule == rule)
        logger.warning("%s: %s, for example %s: %s", rule, f"{count:,}", first.sample_id, first.reason)
    write_table(quarantine_table(unusable, samples), path)


def _balancing_hint(summary: dict[str, Any], batching: BatchingConfig) -> str:
    """Say what to do about ranks that would wait for each other; nothing where nothing helps."""
    packs, ranks = summary["packs"], batching.data_parallel_size
    # Of the last packs some ranks get none, however alike packs are.
    alike = ceil(packs / ranks) * ranks / packs
    helps = batching.packing and batching.packing_strategy != "balanced"
    waits = summary["imbalance"]["together"] / alike - 1 > WORTH_BALANCING
    return "; packing_strategy 'balanced' makes packs of equal work" if helps and waits else ""


def _print_summary(summary: dict[str, Any], batching: BatchingConfig) -> None:
    overlong = summary["overlong"]
    rows = {"optimizer steps": f"{summary['steps']:,} of {batching.packs_per_step:,} packs"}
    if batching.streamed:
        rows["samples"] = f"{summary['samples']:,}, tokenised and packed as they are read"
        rows["figures below"] = f"of {summary['previewed']:,} samples, tokenised to be looked at"
    else:
        slower = summary["imbalance"]["together"] - 1
        supervised = f"{summary['supervised_tokens']:,} ({summary['supervised_tokens'] / summary['tokens']:.1%})"
        rows |= {
            "samples": f"{summary['samples']:,} x {summary['epochs']:.3g} epochs",
            "packs": f"{summary['packs']:,} of {batching.packing_length:,} tokens, {summary['fill']:.1%} full",
            "slowest rank": f"{slower:.1%} above the mean of {batching.data_parallel_size}"
            + _balancing_hint(summary, batching),
            "tokens": f"{summary['tokens']:,}",
            "supervised": supervised,
        }
    rows["over-long"] = f"{len(overlong):,} left out" + (f", the first is {overlong[0]}" if overlong else "")
    if divided := summary["divided"]:
        rows["prompts of their own"] = (
            f"{sum(divided.values()):,} for earlier answers of {len(divided):,} conversations, which the chat template "
            f"renders in another way later, the first is {next(iter(divided))}"
        )
    table = Table("pack plan", "", show_header=True)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _print_sources(sources: list[dict[str, Any]]) -> None:
    table = Table("source", "samples", "tokens", "supervised", "drawn per epoch", "share", "over-long")
    for row in sources:
        counts = (f"{row[name]:,}" for name in ("samples", "tokens", "supervised_tokens"))
        table.add_row(
            row["source"], *counts, f"{row['drawn_per_epoch']:g}", f"{row['share']:.1%}", f"{row['overlong']:,}"
        )
    Console().print(table)


def _texts(messages: pd.Series) -> Iterator[str]:
    for conversation in messages:
        for message in orjson.loads(conversation):
            yield from (item["text"] for item in message["content"] if item["type"] == "text")


def _write_tiny_model(folder: Path, *, model: ModelConfig, corpus: list[str]) -> None:
    from qvl_pipeline.demo.tiny_model import build_tiny_model

    build_tiny_model(folder, family=model.processor_type, seed=model.tiny_seed, corpus=corpus)
    _write_pointer(folder, model=model)


def _write_pointer(folder: Path, *, model: ModelConfig) -> None:
    from qvl_pipeline.storage.digests import write_digests

    write_manifest(folder, model)
    write_digests(folder)

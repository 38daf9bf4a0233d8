"""The label preview: which words of some samples are trained on, and what all of them amount to, as one HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import ProcessorMixin

from qvl_pipeline.families.family import MERGE_SIZE
from qvl_pipeline.families.hearing import audio_tokens
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.reports.page import render
from qvl_pipeline.reports.thumbnail import Thumbnail
from qvl_pipeline.tokens.encoding import placeholder_ids

SAMPLES = 10
# Of a longer stretch of text, the middle is collapsed: a page is to be looked at.
LONGEST_TEXT = 200
# And of a clip that is told its seconds one by one, or of a sample of many media, not every picture.
CLIP_PICTURES, SAMPLE_PICTURES = 8, 16

_TITLES = {
    "tokens": ("Tokens of a sample", "tokens"),
    "supervised_tokens": ("Trained tokens of a sample", "tokens"),
    "vit_patches": ("Vision patches of a sample", "patches"),
    "images": ("Images of a sample", "images"),
    "clips": ("Clips of a sample", "clips"),
    "image_patches": ("Size of an image", "patches"),
    "clip_patches": ("Size of a clip", "patches"),
    "clip_steps": ("Temporal patches of a clip", "temporal patches"),
    "clip_seconds": ("Time that a clip spans", "seconds"),
    "sounds": ("Sounds of a sample", "sounds"),
    "sound_spectra": ("Length of a sound", "hundredths of a second"),
}


class Piece(NamedTuple):
    """A stretch of tokens that are shown alike.

    Attributes:
        kind: `text`, `special` (one special token), `medium` (placeholders) or `gap` (text that is not shown).
        trained: Whether they are trained on.
        text: What is shown.
        medium: Of a medium, its number in the sample.
        step: Of a clip, which of its temporal patches it is; `None` where it is all of them.
    """

    kind: str
    trained: bool
    text: str
    medium: int | None = None
    step: int | None = None


class _Chip(NamedTuple):
    """What stands for a run of placeholders: its text, and the fields of `Piece` with the same names."""

    text: str
    medium: int
    step: int | None = None


def render_label_preview(
    *,
    model_name: str,
    samples: TokenizedSamples,
    processor: ProcessorMixin,
    statistics: dict[str, dict[str, Any]],
    plan_summary: dict[str, Any],
    pictures: Callable[[dict[str, Any], int | None], list[Thumbnail]],
) -> str:
    """Write the page. It makes no request to anywhere and shows text of the data escaped.

    Args:
        model_name: Whose tokens they are.
        samples: The tokenized samples.
        processor: The model's processor.
        statistics: Distributions; see `token_statistics`.
        plan_summary: With its `sources` and `overlong`.
        pictures: Those of a medium, or of one temporal patch of it; see `MediaThumbnails.pictures`.

    Returns:
        HTML, the same bytes for the same inputs.
    """
    columns = samples.columns(["sample_id", "source", "split", "kind"]).to_pandas()
    shown = [samples.row(row) for row in choose_samples(columns, plan_summary["overlong"])]
    return render(
        "label_preview",
        model_name=model_name,
        sources=plan_summary["sources"],
        totals=_totals(plan_summary["sources"]),
        # Of a stream, some samples stand for all.
        all_samples=plan_summary["samples"] if "previewed" in plan_summary else None,
        histograms=[
            {"title": _TITLES[name][0], "unit": _TITLES[name][1], **values, "bins": _bars(values["bins"])}
            for name, values in statistics.items()
        ],
        samples=[{**sample, "pieces": with_pictures(sample, processor, pictures)} for sample in shown],
    )


def choose_samples(columns: pd.DataFrame, overlong: Sequence[str]) -> list[int]:
    """Choose training samples of as many kinds and sources as there are; the same ones for the same table.

    Args:
        columns: `sample_id`, `source`, `split` and `kind` of all samples.
        overlong: Samples that are not trained on.

    Returns:
        At most `SAMPLES` row numbers, rising.
    """
    train = columns[(columns["split"] == "train") & ~columns["sample_id"].isin(overlong)]
    groups = {group: rows.index.tolist() for group, rows in train.groupby(["kind", "source"], sort=True)}
    kinds, sources, chosen = Counter(), Counter(), []
    while len(chosen) < min(SAMPLES, len(train)):
        # What was shown least so far: a kind before a source, and names to break ties.
        kind, source = min((group for group in groups if groups[group]), key=lambda g: (kinds[g[0]], sources[g[1]], g))
        chosen.append(groups[kind, source].pop(0))
        kinds[kind] += 1
        sources[source] += 1
    return sorted(chosen)


def pieces(sample: dict[str, Any], processor: ProcessorMixin) -> Iterator[Piece]:
    """Cut a sample into what is shown alike.

    Args:
        sample: Row of `tokenized_samples`.
        processor: The model's processor.

    Yields:
        The pieces, in order; together they stand for all tokens.
    """
    ids, tokenizer = sample["input_ids"], processor.tokenizer
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in sample["label_spans"]:
        trained[start:end] = True
    special = np.isin(ids, list(tokenizer.added_tokens_decoder))
    placeholder = np.isin(ids, placeholder_ids(processor))
    # A special token stands alone, unless it is one of a run of placeholders.
    joined = np.where(special[1:], placeholder[1:] & (ids[1:] == ids[:-1]), ~special[:-1])
    joined &= trained[1:] == trained[:-1]
    runs = list(pairwise([0, *(np.flatnonzero(~joined) + 1).tolist(), len(ids)]))
    chips = _chips(sample["media"], processor, [end - start for start, end in runs if placeholder[start]])
    for start, end in runs:
        said = bool(trained[start])
        if placeholder[start]:
            yield Piece("medium", said, *next(chips))
        elif end - start <= LONGEST_TEXT:
            yield Piece("special" if special[start] else "text", said, tokenizer.decode(ids[start:end]))
        else:
            head, tail = start + LONGEST_TEXT // 2, end - LONGEST_TEXT // 2
            yield Piece("text", said, tokenizer.decode(ids[start:head]))
            yield Piece("gap", said, f"{tail - head:,} more tokens")
            yield Piece("text", said, tokenizer.decode(ids[tail:end]))


def with_pictures(
    sample: dict[str, Any],
    processor: ProcessorMixin,
    pictures: Callable[[dict[str, Any], int | None], list[Thumbnail]],
) -> list[tuple[Piece, list[Thumbnail]]]:
    """Return the pieces, those of media with their pictures.

    Args:
        sample: Row of `tokenized_samples`.
        processor: The model's processor.
        pictures: Those of a medium, or of one temporal patch of it. Of a clip of many, some have one, and of
            more than a screen of them the first ones.
    """
    found = list(pieces(sample, processor))
    chips = Counter(piece.medium for piece in found if piece.kind == "medium")
    some = {medium: set(np.linspace(0, n - 1, min(n, CLIP_PICTURES)).round()) for medium, n in chips.items()}
    shown: list[tuple[Piece, list[Thumbnail]]] = []
    seen: Counter[int | None] = Counter()
    for piece in found:
        room = sum(len(beside) for _, beside in shown) < SAMPLE_PICTURES
        is_shown = room and piece.medium is not None and seen[piece.medium] in some[piece.medium]
        # Frames of a clip that is heard too stand together, at its first chip.
        is_shown = is_shown and (piece.step is not None or not seen[piece.medium])
        shown.append((piece, pictures(sample["media"][piece.medium], piece.step) if is_shown else []))
        seen[piece.medium] += 1
    return shown


def _chips(media: Sequence[dict[str, Any]], processor: ProcessorMixin, runs: Sequence[int]) -> Iterator[_Chip]:
    """Describe each run of placeholders: a whole medium, or one temporal patch of a clip where times stand between."""
    lengths = iter(runs)
    for number, medium in enumerate(media):
        heard = audio_tokens(medium["spectra"]) if medium["spectra"] else 0
        if heard:  # one run; of a clip that is seen too, pictures and sound take turns
            name = "sound" if medium["type"] == "audio" else "clip with its sound"
            tokens = heard + medium["grid_t"] * medium["grid_h"] * medium["grid_w"] // MERGE_SIZE**2
            run = 0
            while run < tokens:
                run += next(lengths)
                so_far = f"{tokens:,}" if run == tokens else f"{run:,} of {tokens:,}"
                yield _Chip(f"{name} · {medium['spectra']:,} spectra · {so_far} tokens", number)
            continue
        steps, height, width = (medium[f"grid_{axis}"] for axis in "thw")
        all_tokens = steps * height * width // getattr(processor, f"{medium['type']}_processor").merge_size ** 2
        name = {"image": "image", "video": "clip"}[medium["type"]]
        left = all_tokens
        while left:
            run = next(lengths)
            left -= run
            grid = f"{height} by {width}"
            if run == all_tokens:
                part, grid, step = name, f"{steps} by {grid}" if name == "clip" else grid, None
            else:
                step = steps - left * steps // all_tokens - 1
                part = f"{name}, {step + 1} of {steps}"
            yield _Chip(f"{part} · {grid} patches · {run:,} tokens", number, step)


def _totals(sources: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(row[name] for row in sources) for name in ("samples", "tokens", "supervised_tokens", "overlong")}


def _bars(bins: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Labels and relative lengths of the bars of a histogram."""
    most = max(bin_["n"] for bin_ in bins)
    return [{"label": _label(bin_["from"], bin_["to"]), "n": bin_["n"], "share": bin_["n"] / most} for bin_ in bins]


def _label(low: float, high: float) -> str:
    if isinstance(low, int):
        return f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
    return f"{low:g} to {high:g}"

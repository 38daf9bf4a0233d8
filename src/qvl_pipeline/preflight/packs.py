"""The heaviest micro-batches of a training, from its plan or else from its parameters, and all that it does in sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from qvl_pipeline.config import BatchingConfig, ModelConfig
from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.feed.sounds import SoundReader
from qvl_pipeline.engine.parallel.sequence_parallel import SequenceShare, heard_spectra, split_media, temporal_patches
from qvl_pipeline.families import ModelFamily
from qvl_pipeline.families.family import MERGE_SIZE
from qvl_pipeline.families.hearing import SPECTRA_PER_TOKEN, Hearing, audio_tokens
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.tokens.encoding import placeholder_ids

Sample = dict[str, Any]
_SOURCE = "preflight"
# What a micro-batch may have most of, by column of the plan.
_AMOUNTS = {"tokens": "most tokens", "vit_patches": "most patches", "spectra": "most sound"}
# Of an assumed sample: its text, half of which is trained on.
_TEXT = 32


@dataclass(frozen=True)
class Heavy:
    """A micro-batch that is the heaviest in some way.

    Attributes:
        why: In which, for people.
        samples: Its samples.
    """

    why: str
    samples: Sequence[Sample]

    @property
    def tokens(self) -> int:
        """Tokens of its samples."""
        return sum(len(sample["input_ids"]) for sample in self.samples)

    @property
    def patches(self) -> int:
        """Patches of its media."""
        return sum(m["grid_t"] * m["grid_h"] * m["grid_w"] for sample in self.samples for m in sample["media"])

    @property
    def spectra(self) -> int:
        """Spectra of its sounds."""
        return sum(m.get("spectra", 0) for sample in self.samples for m in sample["media"])


@dataclass(frozen=True)
class Work:
    """What a training computes in all.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens.
        targets: Tokens that are trained on.
        pairs: Query-key pairs of the language model.
        patches: Patches of media.
        grids: Number of media by their grid `(t, h, w)`.
        images: Images.
        frames: Frames of clips.
        sounds: Number of sounds by their spectra.
    """

    steps: int
    tokens: int
    targets: int
    pairs: float
    patches: int
    grids: dict[tuple[int, int, int], int]
    images: int
    frames: int
    sounds: dict[int, int]


def heaviest_planned(plan: pd.DataFrame, tokenized: Path, ranks: int, packs_at_once: int) -> list[Heavy]:
    """Find the micro-batches with most tokens, with most patches and, where there is any, with most sound.

    Args:
        plan: The pack plan.
        tokenized: File of `tokenized_samples`.
        ranks: Data-parallel ranks.
        packs_at_once: Packs of a micro-batch.
    """
    rows = TokenizedSamples(tokenized)
    heaviest: dict[str, tuple[int, pd.DataFrame]] = {}
    for packs in _micro_batches(plan, ranks, packs_at_once):
        for column in _AMOUNTS:
            total = int(packs[column].sum())
            if total > heaviest.get(column, (0, None))[0]:
                heaviest[column] = total, packs
    found = []
    for column, name in _AMOUNTS.items():
        if column in heaviest:
            packs = heaviest[column][1]
            place = f"step {int(packs['step'].iloc[0]) + 1}, pack {int(packs['pack'].iloc[0]) + 1}"
            samples = [rows.row(int(row)) for numbers in packs["sample_rows"] for row in numbers]
            found.append(Heavy(f"the plan's pack with {name} ({place})", samples))
    return found


def _micro_batches(plan: pd.DataFrame, ranks: int, packs_at_once: int) -> Iterator[pd.DataFrame]:
    """Yield what the ranks have at once; of one pack each, only the heaviest need be looked at."""
    if packs_at_once == 1:
        for column in _AMOUNTS:
            yield plan.nlargest(1, column)
        return
    for _, packs in plan.groupby("step"):
        for rank in range(ranks):
            own = packs.iloc[rank::ranks]
            for start in range(0, len(own), packs_at_once):
                yield own.iloc[start : start + packs_at_once]


def heaviest_allowed(model: ModelConfig, batching: BatchingConfig, placeholders: tuple[int, ...]) -> list[Heavy]:
    """Make the heaviest micro-batches that the parameters allow: packs full of the largest images, and of sound.

    Args:
        model: Parameters of the model, with its limit of an image's size.
        batching: Parameters of the packs.
        placeholders: Ids of the tokens that stand for media, as `placeholder_ids` returns them.
    """
    images = _full_of_images(model, batching, placeholders[0])
    return [images, _full_of_sound(model.family.hearing, batching, placeholders[2])] if placeholders[2:] else [images]


def _full_of_images(model: ModelConfig, batching: BatchingConfig, placeholder: int) -> Heavy:
    side = max(MERGE_SIZE, int(model.image_max_pixels**0.5 // model.family.patch_size) // MERGE_SIZE * MERGE_SIZE)
    tokens = side * side // MERGE_SIZE**2
    budget, patches_left = batching.packing_length, batching.packing_vit_patches or 4 * batching.packing_length
    samples: list[Sample] = []
    left = budget
    while left > 0:
        fits = min(tokens, left - _TEXT - 2, patches_left // MERGE_SIZE**2)
        if fits < 1:
            samples.append(_made_up(0, left, placeholder, len(samples)))
            break
        # Of what is left, an image of one row.
        height, width = (side, side) if fits == tokens else (MERGE_SIZE, MERGE_SIZE * fits)
        samples.append(_made_up(fits, _TEXT, placeholder, len(samples), height, width))
        left -= len(samples[-1]["input_ids"])
        patches_left -= height * width
        if not batching.packing:
            samples[-1] = _longer(samples[-1], left)
            break
    why = f"the heaviest pack that the parameters allow: {budget:,} tokens, full of images of {side} x {side} patches"
    if not batching.packing:
        why = f"the heaviest sample that the parameters allow: {budget:,} tokens with one image"
    return Heavy(why, samples * batching.per_device_train_batch_size)


def _full_of_sound(hearing: Hearing, batching: BatchingConfig, placeholder: int) -> Heavy:
    """Make the micro-batch with most sound: less work a token than pictures are, unless the vision tower is frozen."""
    budget, longest = batching.packing_length, audio_tokens(hearing.spectra(hearing.longest_s * hearing.sampling_rate))
    samples: list[Sample] = []
    left = budget
    while left > _TEXT:
        tokens = min(longest, left - _TEXT)
        sample = _made_up(tokens, _TEXT, placeholder, len(samples))
        sound = {"type": "audio", "grid_t": 0, "grid_h": 0, "grid_w": 0, "spectra": SPECTRA_PER_TOKEN * tokens}
        samples.append(sample | {"media": [sample["media"][0] | sound]})
        left -= tokens + _TEXT
        if not batching.packing:
            break
    if left > 0:
        samples[-1] = _longer(samples[-1], left)
    why = f"the {'pack' if batching.packing else 'sample'} with most sound that the parameters allow: {budget:,} tokens"
    return Heavy(why, samples * batching.per_device_train_batch_size)


def _made_up(media: int, text: int, placeholder: int, number: int, height: int = 0, width: int = 0) -> Sample:
    ids = np.concatenate([np.full(media, placeholder, np.int32), np.full(text, 10, np.int32)])
    medium = {"type": "image", "key": "", "grid_t": 1, "grid_h": height, "grid_w": width, "seconds_per_grid": 0.0}
    return {
        "sample_id": str(number),
        "source": _SOURCE,
        "input_ids": ids,
        "label_spans": np.array([[max(1, len(ids) - (text + 1) // 2), len(ids)]], dtype=np.int32),
        "media": [medium] if media else [],
    }


def _longer(sample: Sample, tokens: int) -> Sample:
    ids = np.concatenate([sample["input_ids"], np.full(tokens, 10, np.int32)])
    return {**sample, "input_ids": ids, "label_spans": np.array([[len(ids) - tokens - 1, len(ids)]], dtype=np.int32)}


class _NoPixels:
    """Stands in for the patch loader: patches on the meta device."""

    def __init__(self, values: int) -> None:
        self._values = values

    def load(self, media: Sequence[dict[str, Any]]) -> torch.Tensor:
        patches = sum(temporal_patches(item) * item["grid_h"] * item["grid_w"] for item in media)
        return torch.empty(patches, self._values, dtype=torch.uint8, device="meta")


class _NoSounds(SoundReader):
    """Stands in for the sounds: spectrograms on the meta device."""

    def log_mel(self, item: dict[str, Any]) -> torch.Tensor:
        return torch.empty(self.hearing.mel_bins, heard_spectra(item), device="meta")


def make_batch(samples: Sequence[Sample], config: Any, family: ModelFamily, *, degree: int, rmpad: bool) -> Batch:
    """Lay samples out as the rank has them that has most patches of them.

    Args:
        samples: Rows of `tokenized_samples`.
        config: Configuration of the model.
        family: Its family.
        degree: Ranks that share a pack.
        rmpad: Lay out packs; otherwise padded rows.

    Returns:
        A batch on the CPU, but for its patches and spectra.
    """
    vision = config.vision_config
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    seen = [item for sample in samples for item in sample["media"] if item["grid_t"]]
    shares = split_media(seen, degree)
    sizes = [sum(temporal_patches(item) * item["grid_h"] * item["grid_w"] for item in share) for share in shares]
    builder = BatchBuilder(
        loader=_NoPixels(values),
        patch_values=values,
        placeholder_ids=placeholder_ids(config),
        tokens_per_second=family.tokens_per_second(config),
        sources=tuple(sorted({sample["source"] for sample in samples})),
        vision_inputs=partial(family.vision_inputs, vision),
        sounds=_NoSounds(None, family.hearing, config) if family.hearing else None,
        rmpad=rmpad,
        share=SequenceShare(int(np.argmax(sizes)), degree),
    )
    return builder.build(samples, vision=any(sizes))


def work_of(plan: pd.DataFrame, tokenized: Path) -> Work:
    """Add up what a plan has a training do."""
    rows = TokenizedSamples(tokenized)
    table = rows.columns(["length", "supervised_tokens", "vit_patches", "media"])
    times = np.bincount(np.concatenate(plan["sample_rows"].to_list()).astype(np.int64), minlength=len(rows))
    lengths = table["length"].to_numpy().astype(np.float64)
    grids: Counter[tuple[int, int, int]] = Counter()
    sounds: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for item, count in _media_of(table["media"], times):
        if item["grid_t"]:
            grids[item["grid_t"], item["grid_h"], item["grid_w"]] += count
        if item["spectra"]:
            sounds[item["spectra"]] += count
        kinds[item["type"]] += count * (1 if item["type"] == "image" else 2 * item["grid_t"])
    return Work(
        steps=int(plan["step"].iloc[-1]) + 1,
        tokens=int(times @ lengths),
        targets=int(times @ table["supervised_tokens"].to_numpy()),
        pairs=float(times @ (lengths * (lengths + 1) / 2)),
        patches=int(times @ table["vit_patches"].to_numpy()),
        grids=dict(grids),
        images=kinds["image"],
        frames=kinds["video"],
        sounds=dict(sounds),
    )


def _media_of(media: pa.ChunkedArray, times: np.ndarray) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield kinds and sizes of media, and how often samples have one: in columns, for there may be ten million."""
    start = 0
    for lists in media.chunks:
        items = pa.Table.from_struct_array(lists.flatten()).select(["type", "grid_t", "grid_h", "grid_w", "spectra"])
        of_sample = np.repeat(times[start : start + len(lists)], lists.value_lengths())
        start += len(lists)
        alike = items.append_column("times", pa.array(of_sample)).group_by(items.column_names)
        for item in alike.aggregate([("times", "sum")]).to_pylist():
            if count := item.pop("times_sum"):
                yield item, count


def work_of_steps(heavy: Heavy, steps: int, micro_batches: int) -> Work:
    """Take every micro-batch of a training for its heaviest."""
    lengths = np.array([len(sample["input_ids"]) for sample in heavy.samples], dtype=np.float64)
    media = [item for sample in heavy.samples for item in sample["media"]]
    times = steps * micro_batches
    counts = Counter((item["grid_t"], item["grid_h"], item["grid_w"]) for item in media if item["grid_t"])
    sounds = Counter(item["spectra"] for item in media if item.get("spectra"))
    spans = np.concatenate([sample["label_spans"] for sample in heavy.samples])
    return Work(
        steps=steps,
        tokens=times * heavy.tokens,
        targets=times * int((spans[:, 1] - spans[:, 0]).sum()),
        pairs=times * float((lengths * (lengths + 1) / 2).sum()),
        patches=times * heavy.patches,
        grids={grid: times * count for grid, count in counts.items()},
        images=times * sum(item["type"] == "image" for item in media),
        frames=times * sum(2 * item["grid_t"] for item in media if item["type"] == "video"),
        sounds={spectra: times * count for spectra, count in sounds.items()},
    )

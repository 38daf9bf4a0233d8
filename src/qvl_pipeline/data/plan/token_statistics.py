"""What the training samples amount to, in tokens and patches: by source, and as distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_pipeline.media.arrow_rows import TokenizedSamples

MOST_BINS = 16
# Where the largest value is so many times the median, bins double in width: equal ones would hold all in the first.
_LONG_TAIL = 16


def source_table(
    tokenized_path: Path, overlong: Sequence[str], weights: Mapping[str, float]
) -> list[dict[str, str | int | float]]:
    """What each source gives to training.

    Args:
        tokenized_path: File of `tokenized_samples`.
        overlong: Samples that are left out as too long.
        weights: How often each sample of a source is seen per epoch.

    Returns:
        One row for every source with training samples, by name: `samples`, `tokens` and `supervised_tokens` count each
        sample that fits once, `overlong` those that do not; `drawn_per_epoch` is how often a sample is seen per epoch,
        and `share` the part of all tokens seen that are of this source.
    """
    names = ["sample_id", "source", "split", "length", "supervised_tokens"]
    table = TokenizedSamples(tokenized_path).columns(names).to_pandas()
    train = table[table["split"] == "train"]
    fits = ~train["sample_id"].isin(overlong)
    sums = train[fits].groupby("source")[["length", "supervised_tokens"]].sum()
    rows = [
        {
            "source": str(source),
            "samples": int(fit.sum()),
            "tokens": int(sums["length"].get(source, 0)),
            "supervised_tokens": int(sums["supervised_tokens"].get(source, 0)),
            "drawn_per_epoch": weights[source],
            "overlong": int((~fit).sum()),
        }
        for source, fit in fits.groupby(train["source"])
    ]
    seen = sum(row["tokens"] * row["drawn_per_epoch"] for row in rows)
    return [row | {"share": row["tokens"] * row["drawn_per_epoch"] / seen} for row in rows]


def token_statistics(tokenized_path: Path) -> dict[str, dict[str, Any]]:
    """Distributions of the sizes of all training samples, over-long ones too, each counted once.

    Args:
        tokenized_path: File of `tokenized_samples`.

    Returns:
        Of each quantity `n`, `total`, `mean`, `median`, `p95`, `max` and `bins`, a list of {`from`, `to`, `n`} (`from`
        is in the bin, `to` is not). `tokens`, `supervised_tokens`, `vit_patches`, `images`, `clips` and `sounds` are
        those of a sample; `image_patches`, `clip_patches`, `clip_steps` (temporal patches), `clip_seconds` (from the
        first of them to the last) and `sound_spectra` (hundredths of a second) are those of each use of a medium. What
        no sample has is left out.
    """
    table = TokenizedSamples(tokenized_path).columns(["split", "length", "supervised_tokens", "vit_patches", "media"])
    train = table.filter(pc.equal(table["split"], "train"))
    quantities = {
        "tokens": train["length"].to_numpy(),
        "supervised_tokens": train["supervised_tokens"].to_numpy(),
        "vit_patches": train["vit_patches"].to_numpy(),
        **_media_quantities(train["media"]),
    }
    return {name: _distribution(values) for name, values in quantities.items() if values.any()}


def _media_quantities(media: pa.ChunkedArray) -> dict[str, np.ndarray]:
    owners = pc.list_parent_indices(media).to_numpy()
    fields = zip(media.type.value_type, pc.list_flatten(media).flatten(), strict=True)
    items = {field.name: column.to_numpy() for field, column in fields}
    patches = items["grid_t"] * items["grid_h"] * items["grid_w"]
    image, clip, sound = (items["type"] == kind for kind in ("image", "video", "audio"))
    return {
        "images": np.bincount(owners[image], minlength=len(media)),
        "clips": np.bincount(owners[clip], minlength=len(media)),
        "sounds": np.bincount(owners[sound], minlength=len(media)),
        "image_patches": patches[image],
        "clip_patches": patches[clip],
        "clip_steps": items["grid_t"][clip],
        "clip_seconds": ((items["grid_t"] - 1) * items["seconds_per_grid"])[clip],
        "sound_spectra": items["spectra"][sound],
    }


def _distribution(values: np.ndarray) -> dict[str, Any]:
    edges = _edges(values)
    counts, _ = np.histogram(values, edges)
    bins = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return {
        "n": len(values),
        "total": values.sum().item(),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": values.max().item(),
        "bins": [{"from": low, "to": high, "n": count} for low, high, count in bins],
    }


def _edges(values: np.ndarray) -> np.ndarray:
    """Bounds of at most `MOST_BINS` bins, round numbers; the last lies above the largest value.

    `np.histogram` would count a value at the last bound, which is none, into the last bin.
    """
    low, high = values.min().item(), values.max().item()
    if high > _LONG_TAIL * max(np.median(values), 1):
        doubling = 2 ** np.arange(int(np.log2(high)) + 2)
        first = max(len(doubling) - MOST_BINS, np.searchsorted(doubling, max(low, 1), side="right") - 1)
        return np.concatenate([[0], doubling[first:]]) if low < doubling[first] else doubling[first:]
    step = _round_step((high - low) / (MOST_BINS - 1), whole=values.dtype.kind == "i")
    # One more at each end than exact arithmetic needs: 1.0 // 0.1 is 9.
    edges = step * np.arange(low // step - 1, high // step + 3)
    return edges[np.searchsorted(edges, low, side="right") - 1 : np.searchsorted(edges, high, side="right") + 1]


def _round_step(least: float, *, whole: bool) -> float | int:
    """The least of 1, 2, 5, 10, … (and of their tenths, … unless whole numbers are counted) that is no smaller."""
    if least <= 0 or (whole and least <= 1):
        return 1
    power = 10.0 ** np.floor(np.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    return round(step) if whole else step

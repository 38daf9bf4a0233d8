"""The validation page: what a dataset holds and what is wrong with it, as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
import pandas as pd

from qvl_pipeline.reports.page import render

if TYPE_CHECKING:
    import pyarrow as pa

BINS = 12
OFFENDERS_EACH = 3


class _Seen(NamedTuple):
    """What the page needs of the samples.

    Attributes:
        characters: Characters of each sample's texts.
        images: Images of each sample.
        read: Samples by source.
        held_out: Those of the eval split by source.
        media: Uses of files of the samples that are shown, by id.
    """

    characters: np.ndarray
    images: np.ndarray
    read: Counter[str]
    held_out: Counter[str]
    media: dict[str, list[dict[str, Any]]]


def render_validation(
    *,
    report: dict[str, Any],
    samples: Iterable[pa.RecordBatch],
    rejects: pd.DataFrame,
    quarantine: pd.DataFrame,
    warnings: pd.DataFrame,
    media_index: pd.DataFrame,
    thumbnail: Callable[[str, str], str | None],
) -> str:
    """Write the page. It makes no request to anywhere and shows text of the data escaped.

    Args:
        report: `counts`, `rules`, `warnings` and `put_aside`.
        samples: All samples that could be read, batch by batch, with the columns `sample_id`, `source`, `split`,
            `messages` and `media`.
        rejects: Rows that could not be read.
        quarantine: Samples that broke a rule.
        warnings: Valid samples that broke a rule which only warns.
        media_index: Every media file as probed.
        thumbnail: Picture of a media file as a `data:` URI, by its type and path; `None` where it cannot be decoded.

    Returns:
        HTML.
    """
    ids = rejects["source"].astype(str) + "/" + rejects["row"].astype(str)
    lost = pd.concat([rejects.assign(sample_id=ids), quarantine])
    shown = [table.groupby("rule").head(OFFENDERS_EACH)["sample_id"] for table in (lost, warnings)]
    seen = _read(samples, set(pd.concat(shown)))
    return render(
        "validation",
        dataset=", ".join(sorted(set(seen.read) | set(rejects["source"]))) or "no data",
        counts=report["counts"],
        histograms=_histograms(seen, media_index),
        by_source=_by_source(seen, rejects, quarantine),
        put_aside=report["put_aside"],
        lost=_offenders(lost, seen.media, thumbnail),
        warned=_offenders(warnings, seen.media, thumbnail),
        offenders_each=OFFENDERS_EACH,
    )


def _read(samples: Iterable[pa.RecordBatch], shown: set[str]) -> _Seen:
    characters, images = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    read, held_out = Counter(), Counter()
    media: dict[str, list[dict[str, Any]]] = {}
    for batch in samples:
        rows = batch.to_pylist()
        read.update(row["source"] for row in rows)
        held_out.update(row["source"] for row in rows if row["split"] != "train")
        characters.append(np.array([_characters(row["messages"]) for row in rows], np.int64))
        images.append(np.array([sum(use["type"] == "image" for use in row["media"]) for row in rows], np.int64))
        media |= {row["sample_id"]: row["media"] for row in rows if row["sample_id"] in shown}
    return _Seen(np.concatenate(characters), np.concatenate(images), read, held_out, media)


def _characters(messages: str) -> int:
    return sum(len(item.get("text", "")) for turn in orjson.loads(messages) for item in turn["content"])


def _histograms(seen: _Seen, media_index: pd.DataFrame) -> list[dict[str, Any]]:
    clips, sounds = (media_index[media_index["type"] == kind] for kind in ("video", "audio"))
    pixels = (media_index["width"].astype(float) * media_index["height"].astype(float)).dropna()
    wanted = [
        ("Text of a sample", "characters", seen.characters),
        ("Images of a sample", "images", seen.images),
        ("Resolution of a file", "thousand pixels", pixels / 1000),
        ("Duration of a clip", "seconds", clips["duration_s"].astype(float).dropna()),
        ("Frame rate of a clip", "frames a second", clips["fps"].astype(float).dropna()),
        ("Duration of a sound", "seconds", sounds["duration_s"].astype(float).dropna()),
    ]
    return [{"title": title, "unit": unit, "bins": bins} for title, unit, values in wanted if (bins := _bins(values))]


def _bins(values: Any) -> list[dict[str, Any]]:
    """Count values in bins: one for each of few values, else of equal width, wider ones where they spread far."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return []
    distinct = np.unique(array)
    if len(distinct) <= BINS:
        counts = [(f"{value:g}", int((array == value).sum())) for value in distinct]
    else:
        low, high = max(distinct[0], 1e-9), distinct[-1]
        spread = distinct[0] > 0 and high / low > 50
        edges = np.geomspace(low, high, BINS + 1) if spread else np.linspace(distinct[0], high, BINS + 1)
        found, _ = np.histogram(array, np.concatenate([edges[:-1], [np.inf]]))
        counts = [(f"{a:.3g} to {b:.3g}", int(n)) for a, b, n in zip(edges[:-1], edges[1:], found, strict=True)]
    most = max(n for _, n in counts)
    return [{"label": label, "n": n, "share": n / most} for label, n in counts]


def _by_source(seen: _Seen, rejects: pd.DataFrame, quarantine: pd.DataFrame) -> list[dict[str, Any]]:
    rejected, quarantined = Counter(rejects["source"]), Counter(quarantine["source"])
    counts = {"read": seen.read + rejected, "rejected": rejected, "quarantined": quarantined, "eval": seen.held_out}
    sources = sorted(set(seen.read) | set(rejected))
    return [{"source": source, **{name: count[source] for name, count in counts.items()}} for source in sources]


def _offenders(
    broken: pd.DataFrame, media: dict[str, list[dict[str, Any]]], thumbnail: Callable[[str, str], str | None]
) -> list[dict[str, Any]]:
    """The rules that were broken, the most broken first, each with its first rows and their media."""
    groups = []
    for rule, rows in broken.groupby("rule", sort=True):
        shown = [
            {
                "sample_id": row["sample_id"],
                "detail": row["detail"],
                "pictures": [
                    uri for use in media.get(row["sample_id"], [])[:4] if (uri := thumbnail(use["type"], use["path"]))
                ],
            }
            for row in rows.head(OFFENDERS_EACH).to_dict("records")
        ]
        groups.append({"rule": rule, "n": len(rows), "rows": shown})
    return sorted(groups, key=lambda group: (-group["n"], group["rule"]))

"""The validation page: what a dataset holds and what is wrong with it, as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
import pandas as pd

from qvl_pipeline.reports.page import render
from qvl_pipeline.reports.thumbnail import Thumbnail

if TYPE_CHECKING:
    import pyarrow as pa

BINS = 12
OFFENDERS_EACH = 3
# Valid samples that are shown, of as many sources as there are, and what is shown of each.
VALID_SHOWN, TURNS, FILES = 12, 4, 4


class _Seen(NamedTuple):
    """What the page needs of the samples.

    Attributes:
        characters: Characters of each sample's texts.
        images: Images of each sample.
        read: Samples by source.
        held_out: Those of the eval split by source.
        media: Uses of files of the samples that are shown, by id.
        valid: The first valid samples of each source.
    """

    characters: np.ndarray
    images: np.ndarray
    read: Counter[str]
    held_out: Counter[str]
    media: dict[str, list[dict[str, Any]]]
    valid: dict[str, list[dict[str, Any]]]


def render_validation(
    *,
    dataset: str | None,
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
        dataset: Its name; `None` names its sources.
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
    seen = _read(samples, set(pd.concat(shown)), set(quarantine["sample_id"]))
    sources = sorted(set(seen.read) | set(rejects["source"]))
    return render(
        "validation",
        dataset=dataset or ", ".join(sources) or "no data",
        sources=len(sources),
        counts=report["counts"],
        histograms=_histograms(seen, media_index),
        by_source=_by_source(seen, rejects, quarantine),
        put_aside=report["put_aside"],
        valid=[_valid(sample, thumbnail) for sample in _of_all_sources(seen.valid)],
        lost=_offenders(lost, seen.media, thumbnail),
        warned=_offenders(warnings, seen.media, thumbnail),
        offenders_each=OFFENDERS_EACH,
    )


def _read(samples: Iterable[pa.RecordBatch], shown: set[str], quarantined: set[str]) -> _Seen:
    characters, images = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    read, held_out = Counter(), Counter()
    media: dict[str, list[dict[str, Any]]] = {}
    valid: dict[str, list[dict[str, Any]]] = {}
    for batch in samples:
        rows = batch.to_pylist()
        read.update(row["source"] for row in rows)
        held_out.update(row["source"] for row in rows if row["split"] != "train")
        characters.append(np.array([_characters(row["messages"]) for row in rows], np.int64))
        images.append(np.array([sum(use["type"] == "image" for use in row["media"]) for row in rows], np.int64))
        media |= {row["sample_id"]: row["media"] for row in rows if row["sample_id"] in shown}
        for row in rows:
            first = valid.setdefault(row["source"], [])
            if len(first) < VALID_SHOWN and row["sample_id"] not in quarantined:
                first.append(row)
    return _Seen(np.concatenate(characters), np.concatenate(images), read, held_out, media, valid)


def _of_all_sources(valid: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Take samples of all sources in turn, those with media first, as many as are shown."""
    turns = [sorted(rows, key=lambda row: not row["media"]) for _, rows in sorted(valid.items())]
    return [row for rows in zip_longest(*turns) for row in rows if row is not None][:VALID_SHOWN]


def _valid(sample: dict[str, Any], thumbnail: Callable[[str, str], str | None]) -> dict[str, Any]:
    """Return what is shown of a valid sample: its first turns, and pictures or names of its first files."""
    turns = orjson.loads(sample["messages"])
    shown = [{"role": turn["role"], "text": _text(turn)} for turn in turns[:TURNS]]
    return {
        "sample_id": sample["sample_id"],
        "turns": shown,
        "more": len(turns) - len(shown),
        "media": [[_shot(use, thumbnail) for use in sample["media"][:FILES]]] if sample["media"] else [],
    }


def _text(turn: dict[str, Any]) -> str:
    """Return the text of a turn, with names in the places of media, and its calls of tools as they are."""
    texts = [item["text"].strip() if item["type"] == "text" else f"[{item['type']}]" for item in turn["content"]]
    others = {name: value for name, value in turn.items() if value and name not in ("role", "content")}
    return " ".join(text for text in [*texts, orjson.dumps(others).decode() if others else ""] if text)


def _shot(use: dict[str, Any], thumbnail: Callable[[str, str], str | None]) -> Thumbnail:
    uri = thumbnail(use["type"], use["path"])
    return Thumbnail(uri, "" if uri else f"{use['type']} {PurePath(use['path']).name}")


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
        counts = [
            (f"{value:,.0f}" if value.is_integer() else f"{value:.4g}", int((array == value).sum()))
            for value in distinct
        ]
    else:
        low, high = max(distinct[0], 1e-9), distinct[-1]
        spread = distinct[0] > 0 and high / low > 50
        edges = np.geomspace(low, high, BINS + 1) if spread else np.linspace(distinct[0], high, BINS + 1)
        found, _ = np.histogram(array, np.concatenate([edges[:-1], [np.inf]]))
        counts = [(f"{_short(a)} to {_short(b)}", int(n)) for a, b, n in zip(edges[:-1], edges[1:], found, strict=True)]
    most = max(n for _, n in counts)
    return [{"label": label, "n": n, "share": n / most} for label, n in counts]


def _short(value: float) -> str:
    """Write three digits of a number as people do: 2,480 and not 2.48e+03."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else f"{value:.3g}"


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
                    uri
                    for use in media.get(row["sample_id"], [])[:FILES]
                    if (uri := thumbnail(use["type"], use["path"]))
                ],
            }
            for row in rows.head(OFFENDERS_EACH).to_dict("records")
        ]
        groups.append({"rule": rule, "n": len(rows), "rows": shown})
    return sorted(groups, key=lambda group: (-group["n"], group["rule"]))

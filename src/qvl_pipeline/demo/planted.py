"""Deliberately bad rows, one for each rule and source: what the pipeline must find and name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qvl_pipeline.demo.questions import Sample
from qvl_pipeline.demo.sources import SOURCES, Row

REJECTING_RULES = ("unreadable_row", "unknown_format")


class Planted(NamedTuple):
    """How one good row is spoilt.

    Attributes:
        source: Source it is put into.
        kind: Kind of the good row.
        rule: Rule that must name it.
        spoil_row: Damages the row; bytes are a line written as it is.
        spoil_media: Damages the first media file of the row.
    """

    source: str
    kind: str
    rule: str
    spoil_row: Callable[[Row], Row | bytes] = lambda row: row
    spoil_media: Callable[[Path], None] = lambda path: None

    @property
    def stage(self) -> str:
        """The table it must end up in."""
        return "rejects" if self.rule in REJECTING_RULES else "quarantine"


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _overwrite(path: Path) -> None:
    path.write_bytes(b"not a media file\n" * 100)


def _without(*keys: str) -> Callable[[Row], Row]:
    return lambda row: {key: value for key, value in row.items() if key not in keys}


def _only_user(key: str) -> Callable[[Row], Row]:
    return lambda row: row | {key: row[key][:1]}


def _overlong(row: Row) -> Row:
    question, answer = row["messages"]
    text = question["content"][0] | {"text": "What is the last digit of " + "1234567890" * 450 + "?"}
    return row | {"messages": [question | {"content": [text]}, answer]}


PLANTED = (
    Planted("digits_parquet", "single_image", "missing_media", spoil_media=Path.unlink),
    Planted("digits_parquet", "video", "undecodable_media", spoil_media=_overwrite),
    Planted("digits_parquet", "two_images", "no_assistant_turn", spoil_row=_only_user("messages")),
    Planted("digits_parquet", "text", "too_long", spoil_row=_overlong),
    Planted("digits_parquet", "single_image", "undecodable_media", spoil_media=_cut_in_half),
    Planted("digits_jsonl", "video", "undecodable_media", spoil_media=_cut_in_half),
    Planted("digits_jsonl", "text", "unreadable_row", spoil_row=lambda row: b'{"messages": [{"role": "user"'),
    Planted("digits_jsonl", "two_videos", "missing_media", spoil_media=Path.unlink),
    Planted("digits_jsonl", "text", "unknown_format", spoil_row=_without("messages")),
    Planted(
        "digits_sharegpt",
        "two_images",
        "placeholder_mismatch",
        spoil_row=lambda row: row | {"images": row["images"][:1]},
    ),
    Planted("digits_sharegpt", "single_image", "undecodable_media", spoil_media=_overwrite),
    Planted("digits_sharegpt", "image_and_video", "no_assistant_turn", spoil_row=_only_user("conversations")),
    Planted("digits_sharegpt", "text", "unknown_format", spoil_row=_without("conversations")),
)


def plant(folder: Path, rows: dict[str, list[Row | bytes]], samples: list[Sample]) -> list[Row]:
    """Spoil samples and put them among the good rows, evenly spread over each source.

    Args:
        folder: Folder of the dataset, for the media that are damaged.
        rows: Good rows of each source; the bad ones are inserted.
        samples: One good sample for each entry of `PLANTED`, of its kind.

    Returns:
        Where the pipeline must find each of them, and why: `source`, `row`, `stage`, `rule`.
    """
    expected = []
    for source, good in rows.items():
        bad = [(plan, sample) for plan, sample in zip(PLANTED, samples, strict=True) if plan.source == source]
        # In ascending order of position, so that a later insertion moves no earlier one.
        positions = [(place + 1) * (len(good) + len(bad)) // (len(bad) + 1) for place in range(len(bad))]
        for position, (plan, sample) in zip(positions, bad, strict=True):
            for part in sample.media[:1]:
                plan.spoil_media(folder / part.value)
            good.insert(position, plan.spoil_row(SOURCES[source](sample)))
            expected.append({"source": source, "row": position, "stage": plan.stage, "rule": plan.rule})
    return expected

"""The first rows of a source, read as `ingest` would read them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from qvl_pipeline.config import DataEngineConfig, DatasetSource, IngestConfig
from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.readers import RowFiles
from qvl_pipeline.data.sources.raw import find_files
from qvl_pipeline.data.sources.rows import RowReader, assign_split

TRIED = 5
# How much is read to estimate how many rows there are.
_READ_BYTES = 8 << 20
# The eval split of a large source; the more of a small one, the smaller it is.
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# Samples to evaluate on: as many as this, or a fifth of a source that has few.
ENOUGH, SHARE = 10, 5


class TriedRow(NamedTuple):
    """What became of a row.

    Attributes:
        kind: Kind of its sample; empty when there is none.
        media: How many files it uses.
        problem: Rule and reason why it is no sample, or a file of it that is missing; else empty.
    """

    kind: str
    media: int
    problem: str

    def __str__(self) -> str:
        """Say it in one line."""
        if self.problem:
            return self.problem
        files = f", {self.media} media file{'s' * (self.media > 1)} found" if self.media else ""
        return f"{self.kind}{files}"


class Trial(NamedTuple):
    """What the beginning of a source shows.

    Attributes:
        rows: The first rows.
        total: How many rows the source has; more than a piece of it is not read, but estimated.
        eval_fraction: Share of rows to evaluate on; `None` where the rows, or the source, say it themselves.
        eval_samples: About how many these are.
    """

    rows: list[TriedRow]
    total: int
    eval_fraction: float | None
    eval_samples: int


def try_source(source: DatasetSource) -> Trial:
    """Read the first rows of a source, and nothing is left on disk.

    Args:
        source: The source, with paths from the current folder on.

    Raises:
        UserError: A file cannot be read at all.
    """
    files = find_files(source, Path(), "--data")
    sizes = [max(file.path.stat().st_size, 1) for file in files]
    limits = Limits(int(DataEngineConfig().memory_limit_gib * 2**30), _READ_BYTES)
    with tempfile.TemporaryDirectory() as cache, RowFiles(limits) as row_files:
        reader = RowReader(source, IngestConfig(datasets=[source], cache_folder=cache))
        slab = next(row_files.slabs(files[0].path, source.data_type), None)
        records = [] if slab is None else list(_records(slab.rows))
        tried = [_tried(reader.read(record, problem, files[0].split)) for record, problem in records[:TRIED]]
    done = slab.done * sizes[0] / sum(sizes) if slab else 1.0
    total = round(len(records) / done)
    if files[0].split or all(_states_split(record) for record, _ in records):
        return Trial(tried, total, None, 0)
    return Trial(tried, total, *_eval_share(source, records, total))


def _records(rows: Any) -> Iterator[tuple[Any, str | None]]:
    for row in rows.to_pylist():
        yield row["record"], row["problem"]


def _tried(read: dict[str, Any]) -> TriedRow:
    if read.get("rule"):
        return TriedRow("", 0, f"{read['rule']}: {read['detail']}")
    paths = [use["path"] for use in read["media"]]
    missing = next((path for path in paths if not Path(path).is_file()), None)
    return TriedRow(read["kind"], len(paths), f"missing_media: there is no file '{missing}'" if missing else "")


def _states_split(record: Any) -> bool:
    if isinstance(record, bytes):
        try:
            record = orjson.loads(record)
        except orjson.JSONDecodeError:
            return False
    return isinstance(record, dict) and record.get("split") is not None


def _eval_share(source: DatasetSource, records: Sequence[tuple[Any, str | None]], total: int) -> tuple[float, int]:
    """Choose the smallest share that gives enough eval samples: counted where all rows are here, else expected."""
    wanted = min(ENOUGH, max(total // SHARE, 1))
    for fraction in FRACTIONS:
        count = round(fraction * total) if len(records) < total else _count_eval(source, records, fraction)
        if wanted <= count < total:
            return fraction, count
    return FRACTIONS[-1], 0


def _count_eval(source: DatasetSource, records: Sequence[tuple[Any, str | None]], fraction: float) -> int:
    with tempfile.TemporaryDirectory() as cache:
        config = IngestConfig(datasets=[source], cache_folder=cache, eval_fraction=fraction)
        reader = RowReader(source, config)
        read = [reader.read(record, problem, None) for record, problem in records]
    splits = [
        row["split"] or assign_split(f"{source.name}/{number}", config)
        for number, row in enumerate(read)
        if not row.get("rule")
    ]
    return splits.count("eval")

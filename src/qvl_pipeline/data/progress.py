"""The progress bar of the data stages."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Render items per second."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.{0 if speed >= 10 else 1}f} it/s" if speed else "")


def progress_bar() -> Progress:
    """A bar with counts, rate, and the time passed and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


class _RowRateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Render rows per second."""
        return Text(f"{task.fields['rows'] / task.elapsed:,.0f} rows/s" if task.elapsed else "")


def ingest_bar() -> Progress:
    """A bar that goes by bytes, because nobody knows how many rows there are; its tasks have the field `rows`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        _RowRateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )

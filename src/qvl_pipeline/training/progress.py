"""The progress bar of training, fed from `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def training_progress(metrics_path: Path, max_steps: int) -> Iterator[Callable[[], None]]:
    """Show the bar with loss, tokens/s and time left; without a terminal, print a line every tenth of the way.

    Args:
        metrics_path: The engine's `metrics.jsonl`.
        max_steps: Steps of the whole run.

    Yields:
        A function that reads new rows and moves the bar.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=max_steps, loss="-", rate="-")
        read = printed = 0

        def update() -> None:
            nonlocal read, printed
            if not metrics_path.exists():
                return
            lines = metrics_path.read_text(encoding="utf-8").split("\n")[:-1]
            if not lines or len(lines) == read:
                return
            read = len(lines)
            row = json.loads(lines[-1])
            loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            rate = f"{row['tokens_per_second']:,.0f}"
            progress.update(task, completed=row["step"], loss=loss, rate=rate)
            tenth = 10 * row["step"] // max_steps
            if not console.is_terminal and tenth > printed:
                printed = tenth
                print(f"train: step {row['step']}/{max_steps}, loss {loss}, {rate} tokens/s", flush=True)

        yield update

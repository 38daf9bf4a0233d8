"""What hangs on a Ray cluster, and notes in which processes it does."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


def hang(log: Path, *_: Any, **__: Any) -> None:
    """Note this process, and that of the cluster which it works for, and hang."""
    client = multiprocessing.parent_process()
    with log.open("a") as file:
        file.write(f"{os.getpid()} {client.pid if client else os.getpid()}\n")
    time.sleep(600)


def hanging_on(paths: Collection[str], log: Path, read: Callable[..., Any], clip: Any, **how: Any) -> Any:
    """Read a clip; hang where its file is one of `paths`."""
    if clip.path in paths:
        hang(log)
    return read(clip, **how)


def hanging_tokenizer(log: Path, *_: Any) -> Callable[..., Any]:
    """Return what hangs on all samples."""
    return lambda *_: hang(log)


def noted_processes(log: Path) -> list[tuple[int, int]]:
    """Every process that hung, with that of the cluster."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(process), int(client)) for process, client in map(str.split, lines)]

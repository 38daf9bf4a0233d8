"""Work on a Ray cluster that notes who does it, and hangs on the node that is about to be lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def noted(log: Path, doomed: int, work: Callable[..., Any], name: Callable[[Any], str], *piece: Any, **how: Any) -> Any:
    """Note process, node and piece; on the node with the raylet `doomed`, only the first piece is ever finished."""
    raylet = int(os.environ["RAY_RAYLET_PID"])
    with log.open("a") as file:
        file.write(f"{os.getpid()} {raylet} {name(piece[0])}\n")
    if raylet == doomed and len(read_notes(log, doomed)) > 1:
        time.sleep(600)
    while raylet != doomed and len(read_notes(log, doomed)) < 2:
        time.sleep(0.05)  # until there is work on both nodes
    return work(*piece, **how)


def read_notes(log: Path, node: int | None = None) -> list[tuple[int, int, str]]:
    """Process, node and piece of all work, or of that of a node, in the order in which it was begun."""
    notes = [line.split(" ", 2) for line in log.read_text().splitlines()]
    return [(int(pid), int(raylet), piece) for pid, raylet, piece in notes if node in (None, int(raylet))]


def noted_start(log: Path, doomed: int, start: Callable[..., Any], *made_of: Any) -> Callable[..., Any]:
    """Note what is done by what `start` makes."""
    work = start(*made_of)
    return lambda *piece: noted(log, doomed, work, lambda rows: rows[0]["sample_id"], *piece)


def clip_path(clip: Any) -> str:
    """Name of a clip in the notes."""
    return clip.path

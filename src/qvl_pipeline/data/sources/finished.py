"""Parts of a stage's work that are done, kept on disk until all of it is: an interrupted run goes on from there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from qvl_pipeline.data.sources.raw import fingerprint


def begin_part(folder: Path, made_from: Any, begin: Callable[[], Callable[[], pa.Table]]) -> Callable[[], pa.Table]:
    """Begin to make a part, unless it is there.

    Args:
        folder: Where parts are; made when missing.
        made_from: All that decides what is in the part, as a JSON value.
        begin: Begins to make it, and returns what waits for it.

    Returns:
        What reads the part, or waits for it and writes it down.
    """
    path = folder / f"{fingerprint(made_from)}.arrow"
    there = path.exists()
    make = (lambda: begin()()) if there else begin()

    def finish() -> pa.Table:
        if there:
            # Another run of the same, which is done sooner, takes the folder away at any moment: then it is made again.
            with contextlib.suppress(FileNotFoundError), pa.OSFile(str(path)) as file:
                return pa.ipc.open_file(file).read_all()
        part = make()
        with contextlib.suppress(FileNotFoundError):
            _write(path, part)
        return part

    return finish


def _write(path: Path, part: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    with pa.ipc.new_file(str(unfinished), part.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
        file.write_table(part)
    unfinished.replace(path)

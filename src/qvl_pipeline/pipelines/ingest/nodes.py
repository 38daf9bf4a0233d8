"""Nodes of the `ingest` stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qvl_pipeline.config import DataEngineConfig, IngestConfig
from qvl_pipeline.unfinished import unfinished_folder

Writer = Callable[[Path], Any]


def prepare_raw(ingest: IngestConfig) -> dict[str, Any]:
    """Make the embedded dataset when it is asked for, and list the files to read.

    Args:
        ingest: Declared sources.

    Returns:
        The manifest: `files` (`source`, `path`, `bytes`, `sha256`), `demo` (hash of the embedded dataset with its
        media, or `None`) and `fingerprint` (sha256 of both).

    Raises:
        UserError: A source does not exist, or the folder of the embedded dataset holds something else.
    """
    from qvl_pipeline.data.sources.raw import fingerprint, list_files
    from qvl_pipeline.pipelines.ingest.embedded import ensure_digits

    demo = ensure_digits(ingest.demo) if ingest.demo else None
    content = {"files": list_files(ingest), "demo": demo}
    return {**content, "fingerprint": fingerprint(content)}


def ingest_rows(
    ingest: IngestConfig, raw_manifest: dict[str, Any], data_engine: DataEngineConfig
) -> tuple[Writer, Writer]:
    """Read every row of every source.

    Args:
        ingest: Declared sources.
        raw_manifest: Files to read.
        data_engine: Where to work, and with how much memory.

    Returns:
        Functions that move the finished tables `samples` and `rejects` to where they are told: as data frames they
        would not fit into memory.

    Raises:
        UserError: A file as a whole cannot be read.
    """
    from qvl_pipeline.data.sources.ingest import ingest_sources

    unfinished = unfinished_folder(Path(ingest.cache_folder))
    ingest_sources(ingest, raw_manifest["files"], data_engine, Path(unfinished.name))

    def write(name: str, path: Path) -> None:
        shutil.move(Path(unfinished.name) / name, path)

    return partial(write, "samples.parquet"), partial(write, "rejects.parquet")

"""Nodes of the `ingest` stage."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qvl_pipeline.config import IngestConfig


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
    from qvl_pipeline.data.raw import fingerprint, list_files
    from qvl_pipeline.pipelines.ingest.embedded import ensure_digits

    demo = ensure_digits(ingest.demo) if ingest.demo else None
    content = {"files": list_files(ingest), "demo": demo}
    return {**content, "fingerprint": fingerprint(content)}


def ingest_rows(ingest: IngestConfig, raw_manifest: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read every row of every source.

    Args:
        ingest: Declared sources.
        raw_manifest: Files to read.

    Returns:
        The tables `samples` and `rejects`.

    Raises:
        UserError: A file as a whole cannot be read.
    """
    from qvl_pipeline.data.ingest import ingest_sources
    from qvl_pipeline.data.tables import to_frame

    samples, rejects = ingest_sources(ingest, raw_manifest["files"])
    return to_frame(samples), to_frame(rejects)

"""The manifest of the raw files: which files a run reads, and exactly which bytes are in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from qvl_pipeline.config import IngestConfig
from qvl_pipeline.data.paths import project_path
from qvl_pipeline.errors import UserError


def list_files(config: IngestConfig) -> list[dict[str, Any]]:
    """List the files of every source with their size and hash.

    Args:
        config: Declared sources. Where `path` is a folder, its files of the declared type are taken, by name.

    Returns:
        Entries `source`, `path` (as tables hold it), `bytes`, `sha256`.

    Raises:
        UserError: A path does not exist, or is a folder without such files; the message names the parameter.
    """
    return [
        {"source": source.name, "path": project_path(path), "bytes": path.stat().st_size, "sha256": hash_file(path)}
        for number, source in enumerate(config.datasets)
        for path in _source_files(Path(source.path), source.data_type, f"ingest.datasets[{number}].path")
    ]


def fingerprint(content: Any) -> str:
    """Return the sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path, exclude: str) -> str:
    """Return one sha256 over the names and contents of all files of a folder, but for the one named `exclude`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != exclude)
    return fingerprint([[path.relative_to(folder).as_posix(), hash_file(path)] for path in files])


def _source_files(path: Path, data_type: str, parameter: str) -> Iterator[Path]:
    if path.is_file():
        return iter([path])
    if not path.is_dir():
        raise UserError(f"{parameter}: '{path}' does not exist; name a file or folder, from the project root on")
    files = sorted(path.rglob(f"*.{data_type}"))
    if not files:
        raise UserError(f"{parameter}: the folder '{path}' holds no file *.{data_type}; check data_type")
    return iter(files)

"""The manifest of the raw files: which files a run reads, and exactly which bytes are in them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from qvl_pipeline.config import DatasetSource, IngestConfig
from qvl_pipeline.data.sources.forms.benchmarks import BENCHMARKS
from qvl_pipeline.data.sources.paths import project_path
from qvl_pipeline.data.sources.remote import copy_remote, is_url, list_remote
from qvl_pipeline.errors import UserError

_LOGGER = logging.getLogger(__name__)

# How a file type is recognised in a folder.
ENDINGS = {
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "hf_dataset": (".json", ".arrow"),
    **{kind: (f".{kind}", f".{kind}.gz", f".{kind}.zst") for kind in ("json", "jsonl", "csv")},
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.zst"),
}
# Rows, too, by the look of their names, that a folder of another type does not give.
_LIKE_ROWS = tuple({ending for endings in ENDINGS.values() for ending in endings} | {".ndjson", ".bz2", ".xz", ".zip"})
# How Hugging Face datasets name the splits of a `DatasetDict`.
_HF_SPLITS = {"train": "train"} | dict.fromkeys(("eval", "validation", "valid", "val", "dev", "test"), "eval")


def list_files(config: IngestConfig) -> list[dict[str, Any]]:
    """List the files of every source with their size and hash; those behind a URL are copied first.

    Args:
        config: Declared sources. Where `path` is a folder, its files of the declared type are taken, by name.

    Returns:
        Entries `source`, `path` (as tables hold it), `bytes`, `sha256`; with `url` where `path` is the copy of one, and
        `split` where the layout of a dataset of Hugging Face gives it.

    Raises:
        UserError: A path does not exist, or is a folder without such files; the message names the parameter.
    """
    return [
        {
            "source": source.name,
            "path": project_path(file.path),
            "bytes": file.path.stat().st_size,
            "sha256": hash_file(file.path),
            **{key: value for key, value in (("url", file.url), ("split", file.split)) if value},
        }
        for number, source in enumerate(config.datasets)
        for file in find_files(source, Path(config.cache_folder) / "remote", f"ingest.datasets[{number}].path")
    ]


def fingerprint(content: Any) -> str:
    """Return the sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_code(folder: Path) -> str:
    """Return one sha256 over the Python files of a package and its rooms: another version may make something else."""
    return fingerprint([hash_file(path) for path in sorted(folder.rglob("*.py"))])


def hash_folder(folder: Path, exclude: str) -> str:
    """Return one sha256 over the names and contents of all files of a folder, but for the one named `exclude`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != exclude)
    return fingerprint([[path.relative_to(folder).as_posix(), hash_file(path)] for path in files])


class _File(NamedTuple):
    path: Path
    url: str | None = None
    split: str | None = None


def find_files(source: DatasetSource, cache: Path, parameter: str) -> list[_File]:
    """Find the files of a source, in the order in which they are read."""
    remote = is_url(source.path)
    found = list_remote(source.path, source.storage_options) if remote else _list_local(Path(source.path))
    if not found:
        raise UserError(f"{parameter}: '{source.path}' does not exist or is empty; name it from the project root on")
    endings = ENDINGS[source.data_type]
    # A file that is named itself may have any name.
    left_out = {name: None for name in found if name and not name.lower().endswith(endings)}
    found = {name: place for name, place in found.items() if name not in left_out}
    if source.benchmark and found:
        found = _of_benchmark(source.benchmark, found, source.path, parameter)
    if not found:
        kind = f"'{source.path}' holds no file *{' or *'.join(endings)}"
        raise UserError(f"{parameter}: the folder {kind}; check data_type")
    if rows := [name for name in left_out if name.lower().endswith(_LIKE_ROWS)]:
        _LOGGER.warning(
            "%s: '%s' also holds %d files that are not %s and are not read, the first is '%s': make them a source of "
            "their own, or ignore this",
            *(parameter, source.path, len(rows), source.data_type, rows[0]),
        )
    files = {name: _File(Path(place)) for name, place in found.items()}
    if remote:
        copies = copy_remote(found.values(), source.storage_options, cache)
        files = {name: _File(copies[url], url) for name, url in found.items()}
    return list(_hf_files(files, source.path, parameter) if source.data_type == "hf_dataset" else files.values())


def _of_benchmark(name: str, found: dict[str, str], folder: str, parameter: str) -> dict[str, str]:
    """Return the files that hold the split of a benchmark."""
    files = BENCHMARKS[name].files(list(found))
    if not files:
        raise UserError(
            f"{parameter}: '{folder}' holds no file {BENCHMARKS[name].split}*.parquet, as the repository of {name} "
            "has: name the folder that it was downloaded to, or a file of it"
        )
    return {file: found[file] for file in files}


def _list_local(path: Path) -> dict[str, str]:
    """Return all files of a folder by their names in it; a file itself has the name ''."""
    if path.is_file():
        return {"": str(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): str(file) for file in files}


def _hf_files(files: Mapping[str, _File], folder: str, parameter: str) -> Iterator[_File]:
    """Yield the data files that `save_to_disk` lists, of a dataset or of all splits of a `DatasetDict`."""
    folders = {"": None}
    if "dataset_dict.json" in files:
        splits = orjson.loads(files["dataset_dict.json"].path.read_bytes())["splits"]
        folders = {f"{split}/": _hf_split(split, folder, parameter) for split in splits}
    for prefix, split in folders.items():
        if f"{prefix}state.json" not in files:
            raise UserError(
                f"{parameter}: '{folder}/{prefix}' holds no state.json, so it was not made by `save_to_disk` of "
                "Hugging Face datasets; check data_type"
            )
        for entry in orjson.loads(files[f"{prefix}state.json"].path.read_bytes())["_data_files"]:
            name = prefix + entry["filename"]
            if name not in files:
                raise UserError(f"{parameter}: '{folder}/{name}' is missing, which its state.json lists")
            yield files[name]._replace(split=split)


def _hf_split(name: str, folder: str, parameter: str) -> str:
    if name not in _HF_SPLITS:
        known = ", ".join(_HF_SPLITS)
        raise UserError(
            f"{parameter}: '{folder}' has the split '{name}'; known are {known}: declare '{folder}/{name}' as a source "
            "of its own, with its `split`"
        )
    return _HF_SPLITS[name]

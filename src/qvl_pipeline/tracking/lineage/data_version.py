"""Which version of a file or folder this is, in the terms of DVC: `dvc pull` finds the same content by it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvl_pipeline.tracking.lineage import digests


@dataclass(frozen=True)
class DataVersion:
    """A version of a file or folder.

    Attributes:
        digest: `md5:` and DVC's md5, or `len:` and a digest of names and sizes: 36 characters at most, MLflow's limit.
        origin: What is known of it: the DVC file that holds it, or why there is none.
    """

    digest: str
    origin: str


def data_version(path: Path, *, read_all: bool = False) -> DataVersion:
    """Return the version of a file or folder as it is on disk now.

    Up to `digests.MAX_HASHED_BYTES` the md5 is computed, as DVC does: it holds for this very content, whatever
    `dvc.lock` says. Of more data, DVC's own record is believed when its size is that on disk.

    Args:
        path: File or folder, relative to the project root, the current folder, or absolute.
        read_all: Compute the md5 whatever the size.
    """
    size = sum(file.stat().st_size for file in _files(path))
    recorded, where = _recorded(path)
    if read_all or size <= digests.MAX_HASHED_BYTES:
        md5 = dvc_md5(path)
        known = recorded is not None and recorded["md5"] == md5
        return DataVersion(f"md5:{md5.removesuffix('.dir')}", where if known else "content, not recorded by DVC")
    if recorded is not None and recorded.get("size") == size:
        return DataVersion(f"md5:{recorded['md5'].removesuffix('.dir')}", where)
    return DataVersion(digests.content_digest(path), "names and sizes, too large to read and not recorded by DVC")


def dvc_md5(path: Path) -> str:
    """Return the md5 that DVC 3 gives a file, or a folder (with `.dir` behind it): that of its list of files."""
    if not path.is_dir():
        return _md5(path)
    # The order and the layout of dvc_data.hashfile.tree.Tree.as_bytes.
    entries = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in _files(path)]
    listing = json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _recorded(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return DVC's entry for `path` in its own `.dvc` file or in `dvc.lock`, and the name of that file."""
    pointer = path.with_name(f"{path.name}.dvc")
    if pointer.is_file():
        return yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0], pointer.name
    lock, absolute = Path("dvc.lock"), path.absolute()
    stages = yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages", {}) if lock.is_file() else {}
    for stage in stages.values():
        for out in stage.get("outs", []):
            if Path(out["path"]).absolute() == absolute and "md5" in out:
                return out, lock.name
    return None, ""

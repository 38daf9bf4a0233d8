"""Which version of a file or folder this is, in the terms of DVC: `dvc pull` finds the same content by it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from qvl_pipeline.tracking.lineage import digests
from qvl_pipeline.tracking.lineage.dvc_cache import files_of_version


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
    size = _size(path)
    record = _recorded(path)
    if read_all or size <= digests.MAX_HASHED_BYTES:
        md5 = dvc_md5(path)
        known = record is not None and record.md5_of(path) == md5
        return DataVersion(f"md5:{md5.removesuffix('.dir')}", record.where if known else "content, not recorded by DVC")
    if record is not None and record.size == _size(record.path) and (md5 := record.md5_of(path)):
        return DataVersion(f"md5:{md5.removesuffix('.dir')}", record.where)
    return DataVersion(digests.content_digest(path), "names and sizes, too large to read and not recorded by DVC")


def dvc_md5(path: Path) -> str:
    """Return the md5 that DVC 3 gives a file, or a folder (with `.dir` behind it): that of its list of files."""
    if not path.is_dir():
        return _md5(path)
    return _md5_of_list({file.relative_to(path).as_posix(): _md5(file) for file in _files(path)})


def _md5_of_list(md5s: dict[str, str]) -> str:
    """Return DVC's md5 of a folder, by that of each file in it."""
    # The order and the layout of dvc_data.hashfile.tree.Tree.as_bytes.
    listing = json.dumps([{"md5": md5, "relpath": name} for name, md5 in sorted(md5s.items())], sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


@dataclass(frozen=True)
class _Record:
    """What DVC has of a file or folder, `path`: its md5 and size, and the name of the file that says so."""

    path: Path
    md5: str
    size: int | None
    where: str

    def md5_of(self, path: Path) -> str | None:
        """Return the md5 that DVC has of what is at `path` in it; `None` where it cannot be told."""
        inside = path.absolute().relative_to(self.path).as_posix()
        if inside == ".":
            return self.md5
        listed = files_of_version(Path.cwd(), self.md5)
        if listed is None and _size(self.path) <= digests.MAX_HASHED_BYTES and dvc_md5(self.path) == self.md5:
            return dvc_md5(path)  # the cache is not here, and all of the folder is as it was recorded
        if listed is None or inside in listed:
            return (listed or {}).get(inside)
        start = f"{inside}/"
        below = {name.removeprefix(start): md5 for name, md5 in listed.items() if name.startswith(start)}
        return _md5_of_list(below) if below else None


def _recorded(path: Path) -> _Record | None:
    """Return what DVC has of `path`, or of a folder that it is in, by a `.dvc` file or by `dvc.lock`."""
    lock, absolute, project = Path("dvc.lock"), path.absolute(), Path.cwd()
    stages = yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages", {}) if lock.is_file() else {}
    locked = {Path(out["path"]).absolute(): out for stage in stages.values() for out in stage.get("outs", [])}
    for place in (absolute, *absolute.parents):
        if place == project or place.parent == place:
            return None
        pointer = place.with_name(f"{place.name}.dvc")
        if pointer.is_file():
            out = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0]
            return _Record(place, out["md5"], out.get("size"), pointer.name)
        if "md5" in (out := locked.get(place, {})):
            return _Record(place, out["md5"], out.get("size"), lock.name)
    return None

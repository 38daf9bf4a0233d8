"""Data by its md5, out of DVC's cache; what the cache lacks is fetched from the default remote."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_pipeline.secrets import without_secrets

if TYPE_CHECKING:
    from dvc.repo import Repo

logger = logging.getLogger(__name__)


def link_by_md5(project: Path, md5: str, target: Path) -> bool:
    """Put a version of a file or folder at `target`, by hard links, which take no space: do not write to its files.

    Args:
        project: Root of the project, whose cache and remote are asked.
        md5: What DVC calls the version, with or without the `.dir` of folders.
        target: Where it is wanted; replaced when there is something.

    Returns:
        Whether it is there now. It is not when neither the cache nor the remote has it whole; the log says why.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(project)) as repo:
            found = _in_cache(repo, md5.removesuffix(".dir"))
    except NotDvcRepoError:
        return False
    except Exception as error:  # Whatever the library of a remote raises: the data can be made again.
        logger.warning("DVC does not have %s: %s", target, without_secrets(str(error)))
        return False
    if found is None:
        return False
    for name, file in found.items():
        link_file(file, target / name if name else target)
    return True


def files_of_version(project: Path, md5: str) -> dict[str, str] | None:
    """Return the md5 of each file of a folder by its name there, as DVC's cache has it; `None` where it does not.

    Args:
        project: Root of the project.
        md5: Version of the folder, with the `.dir` behind it.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(project)) as repo:
            listing = Path(repo.cache.local.oid_to_path(md5))
            entries = json.loads(listing.read_text(encoding="utf-8"))
    except (DvcException, OSError):
        return None
    return {entry["relpath"]: entry["md5"] for entry in entries}


def _in_cache(repo: Repo, md5: str) -> dict[str, Path] | None:
    """Return the files of a version in the cache, by their names in the folder; that of a single file has none."""
    cache = repo.cache.local
    if _fetch(repo, {md5}):
        return {"": Path(cache.oid_to_path(md5))}
    listing = f"{md5}.dir"
    if not _fetch(repo, {listing}):
        return None
    entries = json.loads(Path(cache.oid_to_path(listing)).read_text(encoding="utf-8"))
    if not _fetch(repo, {entry["md5"] for entry in entries}):
        return None
    return {entry["relpath"]: Path(cache.oid_to_path(entry["md5"])) for entry in entries}


def _fetch(repo: Repo, names: set[str]) -> bool:
    """Return whether the cache has all of these, once the remote was asked for those that it lacked."""
    from dvc_data.hashfile.hash_info import HashInfo

    cache = repo.cache.local
    missing = {name for name in names if not cache.exists(name)}
    if missing and repo.config["core"].get("remote"):
        remote = repo.cloud.get_remote_odb()
        if all(map(remote.exists, missing)):
            repo.cloud.pull([HashInfo("md5", name) for name in missing])
    return all(map(cache.exists, missing))


def link_file(source: str | Path, target: str | Path) -> None:
    """Put a hard link of a file at `target`, or a copy of it where the file system has none."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)

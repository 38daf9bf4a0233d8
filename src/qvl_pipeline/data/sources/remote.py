"""Files behind a URL: listed, and copied once, so that all later stages read plain local files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import orjson
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from qvl_pipeline.errors import UserError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# What tells one version of a file from another, by file system; the first that is there.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")
# Copies wait for the network, not for a core.
_COPIES_AT_ONCE = 16


def is_url(path: str) -> bool:
    """Whether a path is a URL of any kind."""
    return _URL.match(path) is not None


def list_remote(url: str, options: Mapping[str, Any]) -> dict[str, str]:
    """List a file, or all files of a folder with those below it.

    Args:
        url: Where to look.
        options: Options of its file system.

    Returns:
        URL of each file by its name in the folder, sorted; a file itself has the name ''. Empty when there is nothing.

    Raises:
        UserError: The file system cannot be reached or refuses.
    """
    try:
        fs, root = url_to_fs(url, **options)
        fs.invalidate_cache()
        paths = [path.strip("/") for path in fs.find(root)]
        root = root.strip("/")
        return {path.removeprefix(root).strip("/"): fs.unstrip_protocol(path) for path in sorted(paths)}
    except Exception as error:  # every file system has errors of its own
        raise _failure(url, error) from error


def copy_remote(urls: Iterable[str], options: Mapping[str, Any], cache: Path) -> dict[str, Path | None]:
    """Copy files that are not there already in the same version.

    Args:
        urls: Files.
        options: Options of their file system.
        cache: Folder of the copies.

    Returns:
        Path of the copy by URL, `None` where there is no such file. The path depends on URL, size and version (ETag).

    Raises:
        UserError: A file cannot be read for any other reason than not being there, or was cut off.
    """
    urls = sorted(set(urls))
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
        return dict(zip(urls, pool.map(partial(_copy, options=options, cache=cache), urls), strict=True))


def _copy(url: str, options: Mapping[str, Any], cache: Path) -> Path | None:
    try:
        fs, path = url_to_fs(url, **options)
        info = fs.info(path)
        if info["type"] != "file":
            return None
        copy = cache / _name(url, info)
        if not copy.exists():
            _download(fs, path, info["size"], copy)
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except Exception as error:
        raise _failure(url, error) from error
    return copy


def _download(fs: AbstractFileSystem, path: str, size: int, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial_copy = copy.with_name(f".{copy.name}.{uuid4().hex}")
    try:
        fs.get_file(path, str(partial_copy))
        if (found := partial_copy.stat().st_size) != size:
            raise UserError(
                f"'{path}' has {size} bytes, of which {found} arrived: it changed or was cut off; run again"
            )
        partial_copy.replace(copy)
    finally:
        partial_copy.unlink(missing_ok=True)


def _name(url: str, info: Mapping[str, Any]) -> str:
    """Name of the copy of one version of a file."""
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    digest = hashlib.sha256(orjson.dumps([url, info["size"], version])).hexdigest()
    suffix = "".join(_SUFFIX.findall(PurePosixPath(url).name)[-2:])
    return f"{digest[:2]}/{digest[:40]}{suffix}"


def _failure(url: str, error: Exception) -> UserError:
    # The type only and the first line: what libraries add may hold headers of the request.
    reason = str(error).splitlines()[0][:200] if str(error) else ""
    return UserError(
        f"'{url}' cannot be read ({type(error).__name__}: {reason}): check the URL, storage_options, and the "
        "credentials in the environment"
    )

"""Files behind a URL: listed, and copied once, so that all later stages read plain local files."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
from fsspec import AbstractFileSystem, Callback
from fsspec.core import url_to_fs

from qvl_pipeline.errors import UserError
from qvl_pipeline.secrets import without_url_secrets

if TYPE_CHECKING:
    from aiohttp import ClientSession

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# What tells one version of a file from another, by file system; the first that is there.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")
# Copies wait for the network, not for a core.
_COPIES_AT_ONCE = 16
# A server that says nothing for so long is given up, and after so long one that sends less than this.
_SILENCE_S = 30
_LEAST_BYTES_A_SECOND = 10_000

_LOGGER = logging.getLogger(__name__)


def is_url(path: str) -> bool:
    """Whether a path is a URL of any kind."""
    return "://" in path and _URL.match(path) is not None


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
        fs, root = _file_system(url, options)
        fs.invalidate_cache()
        paths = [path.strip("/") for path in fs.find(root)]
        root = root.strip("/")
        return {path.removeprefix(root).strip("/"): fs.unstrip_protocol(path) for path in sorted(paths)}
    except UserError:
        raise
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
        fs, path = _file_system(url, options)
        info = fs.info(path)
        if info["type"] != "file":
            return None
        copy = cache / _name(url, info)
        if not copy.exists():
            _download(fs, path, info["size"], copy)
    except FileNotFoundError as error:
        if isinstance(
            error.__cause__, UserError
        ):  # a redirect that is not followed, to fsspec a file that is not there
            _LOGGER.warning("%s", error.__cause__)
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
        fs.get_file(path, str(partial_copy), callback=_Pace(path))
        if (found := partial_copy.stat().st_size) != size:
            raise UserError(
                f"'{path}' has {size} bytes, of which {found} arrived: it changed or was cut off; run again"
            )
        partial_copy.replace(copy)
    finally:
        partial_copy.unlink(missing_ok=True)


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL and the path there; one of HTTP stays on its host, and gives up on silence."""
    own = {"get_client": _http_client} if url.lower().startswith(("http://", "https://")) else {}
    return url_to_fs(url, **own, **options)


async def _http_client(**options: Any) -> ClientSession:
    from aiohttp import ClientSession, ClientTimeout, TraceConfig

    trace = TraceConfig()
    trace.on_request_redirect.append(_stay_on_host)
    # No limit for a whole transfer: large files take long. `_Pace` ends those that do not come to anything.
    timeout = ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
    return ClientSession(**{"timeout": timeout} | options, trace_configs=[trace])


async def _stay_on_host(_session: Any, _context: Any, redirect: Any) -> None:
    """Refuse a redirect to another server: what a row names could otherwise be fetched from anywhere."""
    here = redirect.url
    there = here.join(type(here)(redirect.response.headers.get("Location", "")))
    secured = here.host == there.host and (here.scheme, there.scheme) == ("http", "https") and there.is_default_port()
    if here.origin() != there.origin() and not secured:
        # Those that storage servers redirect to are signed.
        there = without_url_secrets(str(there))
        raise UserError(
            f"'{here}' redirects to '{there}', another server, which is not followed: copy the file to here"
        )


class _Pace(Callback):
    """Ends a transfer that takes for ever."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._start = time.monotonic()
        self._bytes = 0

    def relative_update(self, inc: int = 1) -> None:
        self._bytes += inc
        seconds = time.monotonic() - self._start
        if seconds > _SILENCE_S and self._bytes / seconds < _LEAST_BYTES_A_SECOND:
            raise UserError(
                f"'{self._path}' arrives at {self._bytes / seconds:,.0f} bytes a second, which is given up: run again, "
                "or copy the file yourself"
            )


def _name(url: str, info: Mapping[str, Any]) -> str:
    """Name of the copy of one version of a file."""
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    digest = hashlib.sha256(orjson.dumps([url, info["size"], version])).hexdigest()
    suffix = "".join(_SUFFIX.findall(PurePosixPath(url).name)[-2:])
    return f"{digest[:2]}/{digest[:40]}{suffix}"


def _failure(url: str, error: Exception) -> UserError:
    # The type only and the first line: what libraries add may hold headers of the request.
    reason = without_url_secrets(str(error).splitlines()[0])[:200] if str(error) else ""
    return UserError(
        f"'{without_url_secrets(url)}' cannot be read ({type(error).__name__}: {reason}): check the URL, "
        "storage_options, and the credentials in the environment"
    )

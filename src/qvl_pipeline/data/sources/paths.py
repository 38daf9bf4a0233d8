"""Paths as tables hold them: the same on every machine, and inside the folder they were given for."""

from __future__ import annotations

import os
import os.path
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from qvl_pipeline.data.rejection import RejectedRowError, quote
from qvl_pipeline.data.sources.remote import is_url
from qvl_pipeline.secrets import url_holds_secret

# qwen_vl_utils names local files this way, without percent-encoding.
_FILE_SCHEME = "file://"
# No file system refuses a name of so many characters, of up to four bytes each.
_SHORT = 60


def project_path(path: Path) -> str:
    """Write a path as tables hold it: POSIX, relative to the project root (the working directory) when inside of it."""
    return _normal(path).removeprefix(f"{Path.cwd()}/")


def media_folder(folder: str) -> LocalFolder | RemoteFolder:
    """Make the folder that the media of a source must stay inside, from its parameter `data_folder`."""
    return RemoteFolder(folder) if is_url(folder) else LocalFolder(Path(folder))


def name_prefixes(folders: Iterable[str]) -> list[str]:
    """Return what `name_of` takes away from a path.

    Args:
        folders: Parameters `data_folder` of all sources; one that is not set is the project root.

    Returns:
        Their absolute paths, as they are stated and without links, or URLs, the outermost first; then the path of the
        project root.
    """
    project = f"{Path.cwd()}/"
    stated = {media_folder(folder).root for folder in folders}
    real = {str(_real(root)) for root in stated if not is_url(root)}
    return [*sorted({f"{root.rstrip('/')}/" for root in stated | real} - {project}, key=len), project]


def name_of(path: str, prefixes: Sequence[str]) -> str:
    """Name a medium independently of where its dataset lies, and of which source it is used by.

    Args:
        path: Path as tables hold it, or URL.
        prefixes: Of the folders that media are in.

    Returns:
        Its path from the outermost of the folders on.
    """
    full = path if is_url(path) or path.startswith("/") else prefixes[-1] + path
    *folders, project = prefixes
    if not full.startswith(tuple(folders) or project):
        real = str(_real(full))  # a row may name it by another link than that of the folder
        if real.startswith(tuple(folders)) or not full.startswith(project):
            full = real
    return full.removeprefix(next((prefix for prefix in prefixes if full.startswith(prefix)), ""))


class RemoteFolder:
    """A folder behind a URL."""

    def __init__(self, url: str) -> None:
        """Take the URL of the folder."""
        self._scheme, _, path = url.rstrip("/").partition("://")
        self._root = posixpath.normpath(path)

    @property
    def root(self) -> str:
        """URL of the folder."""
        return f"{self._scheme}://{self._root}"

    def locate(self, reference: str) -> str:
        """Find where a medium must be. Whether it is there is not checked.

        Args:
            reference: What a row names: a path from the folder on, or a URL inside of it.

        Returns:
            Its URL.

        Raises:
            RejectedRowError: The reference is no usable path (`unknown_format`), leaves the folder
                (`path_outside_data_folder`), or is a URL with a password or a signature (`url_with_secret`).
        """
        _refuse_nul(reference)
        if secret := url_holds_secret(reference):
            raise RejectedRowError(
                "url_with_secret",
                f"{quote(reference)} holds {secret}: name the file alone, and give credentials in the environment",
            )
        scheme, separator, path = reference.partition("://")
        if not separator:
            scheme, path = self._scheme, posixpath.join(self._root, reference)
        path = posixpath.normpath(path)
        # Servers of HTTP take `%2e%2e` for `..`.
        decoded = posixpath.normpath(unquote(path))
        inside = path.startswith(f"{self._root}/") and decoded.startswith(unquote(f"{self._root}/"))
        if scheme != self._scheme or not inside:
            raise _outside(reference, self.root)
        return f"{scheme}://{path}"


class LocalFolder:
    """A folder on disk.

    Works on strings: a `Path` for each step would take as long as all the rest of reading a row.
    """

    def __init__(self, folder: Path) -> None:
        """Take `folder`, relative to the project root or absolute."""
        self._folder = _normal(folder)
        self._real = _real(self._folder)
        self._root = f"{Path.cwd()}/"
        # By folder: whether it lies inside, and the names of the links in it (`None` if it cannot be listed). Written
        # in one assignment, since Daft's runner on Ray reads rows in several threads of one process.
        self._looked_at: dict[str, tuple[bool, set[str] | None]] = {}

    @property
    def root(self) -> str:
        """Absolute path of the folder."""
        return self._folder

    def locate(self, reference: str) -> str:
        """Find where a medium must be. Whether it is there is not checked.

        Args:
            reference: What a row names: a path from the folder on, an absolute path, or `file://` and one of these.

        Returns:
            Path as tables hold it.

        Raises:
            RejectedRowError: The reference is a URL (`url_not_allowed`), no usable path (`unknown_format`), or leaves
                the folder, also through a symbolic link (`path_outside_data_folder`).
        """
        reference = reference.removeprefix(_FILE_SCHEME)
        if is_url(reference):
            raise RejectedRowError(
                "url_not_allowed", f"{quote(reference)} is a URL: save it as a file and name that, or set data_folder"
            )
        _refuse_nul(reference)
        path = os.path.normpath(reference if reference.startswith("/") else f"{self._folder}/{reference}")
        try:
            inside = self._holds_file(path)
        except OSError as error:  # a name longer than the file system allows
            raise RejectedRowError("unknown_format", f"{quote(reference)} is no path: {error.strerror}") from error
        if not inside:
            outside = _outside(reference, self._folder.removeprefix(self._root))
            inner = reference.lstrip("/")
            if reference.startswith("/") and ".." not in inner and os.path.lexists(f"{self._folder}/{inner}"):
                outside.detail += f", but '{inner}' is there: paths without / in front start from data_folder"
            raise outside
        return path.removeprefix(self._root)

    def _holds_file(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        folder = folder or "/"
        if folder not in self._looked_at:
            self._looked_at[folder] = _real(folder).is_relative_to(self._real), _links(folder)
        folder_is_inside, links = self._looked_at[folder]
        # One listing of a folder instead of a look at each file, which is what most of the time went into. A long name
        # is looked at all the same: it may be longer than the file system allows.
        is_link = Path(path).is_symlink() if links is None or len(name) > _SHORT else name in links
        return _real(path).is_relative_to(self._real) if is_link else folder_is_inside


def _links(folder: str) -> set[str] | None:
    """Name the symbolic links in a folder; nothing, where it is none; `None`, where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:
        return None


def _refuse_nul(reference: str) -> None:
    if "\0" in reference:
        raise RejectedRowError("unknown_format", f"{quote(reference)} is no path: it holds a NUL")


def _outside(reference: str, folder: str) -> RejectedRowError:
    return RejectedRowError("path_outside_data_folder", f"{quote(reference)} is outside of '{folder}'")


def _real(path: str) -> Path:
    """Follow all links. `Path.resolve` would do, but on a circle of links it raises before Python 3.13."""
    return Path(os.path.realpath(path))


def _normal(path: Path) -> str:
    """Make a path absolute and take out `.` and `..`, without following links."""
    return os.path.normpath(path.absolute())

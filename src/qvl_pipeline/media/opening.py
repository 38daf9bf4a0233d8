"""Opening media: which formats are media at all, and that a file is, and stays, the one that was meant.

A format that is not listed here is not tried: many of FFmpeg's and Pillow's read other files, ask servers (`hls`,
`concat`, `dash`, numbered images) or start programs (Ghostscript, for EPS), whatever the name of the file says.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qvl_pipeline.errors import UserError

# As Pillow names them: pictures of pixels, without scripts, each all in its own file.
IMAGE_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000"),
    *("PPM", "TGA", "ICO", "PCX", "QOI", "SGI"),
)
# As FFmpeg names them. None opens a second file. Those of sound are tried to say that there is no picture in them.
VIDEO_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "nut", "ivf", "dv", "rm", "wtv"),
    *("gif", "apng", "yuv4mpegpipe", "h264", "hevc", "av1", "obu", "mpegvideo", "m4v", "mjpeg", "vc1"),
    *("wav", "mp3", "flac", "aac"),
)
# Options of `av.open`: the formats above, out of files on disk.
VIDEO_OPTIONS = {"format_whitelist": ",".join(VIDEO_FORMATS), "protocol_whitelist": "file"}

_OWN_DESCRIPTORS = Path("/proc/self/fd")


class NoFileError(UserError):
    """What is there is not a file."""


class OutsideFolderError(UserError):
    """A path leads out of the folders that media are in."""


class ChangedMediaError(UserError):
    """A file is not the one that was validated."""


@dataclass(frozen=True)
class OpenMedia:
    """A file that is open: it prints as its name, and whoever opens it as a path gets this file, whatever is there now.

    Attributes:
        name: Its path.
        descriptor: Its file descriptor.
        identity: Device, inode, size in bytes and time of the last change in nanoseconds. Two are equal if this is.
    """

    name: str = field(compare=False)
    descriptor: int = field(compare=False)
    identity: tuple[int, int, int, int]

    def __str__(self) -> str:
        """Its path."""
        return self.name

    def __fspath__(self) -> str:
        """A path that opens this very file; where the system has none, its own path."""
        own = _OWN_DESCRIPTORS / str(self.descriptor)
        return str(own) if _OWN_DESCRIPTORS.exists() else self.name

    @property
    def size(self) -> int:
        """Bytes."""
        return self.identity[2]


@contextmanager
def open_picture(file: OpenMedia) -> Iterator[Image.Image]:
    """Open a file as an image.

    Raises:
        UnidentifiedImageError: It is of none of the formats that are read.
        Exception: Whatever Pillow's parsers stumble over.
    """
    os.lseek(file.descriptor, 0, os.SEEK_SET)
    # By the descriptor: of a path, Pillow follows the links once more.
    with os.fdopen(file.descriptor, "rb", closefd=False) as content:
        try:
            image = Image.open(content, formats=IMAGE_FORMATS)
        except UnidentifiedImageError:
            raise UnidentifiedImageError("cannot identify image file: it is of no format that is read") from None
        with image:
            yield image


@contextmanager
def open_media(
    path: str | os.PathLike[str], *, content_hash: str | None = None, folders: Sequence[str] | None = None
) -> Iterator[OpenMedia]:
    """Open a media file.

    Args:
        path: The file.
        content_hash: Sha256 of what must be in it; `None` where that is not known.
        folders: Real paths of the folders that it must be inside of, links followed; `None` where that is checked.

    Yields:
        The open file.

    Raises:
        OSError: It is not there, or cannot be opened.
        NoFileError: It is a folder, a device, a pipe.
        OutsideFolderError: It is outside of the folders; it has not been read then.
        ChangedMediaError: It holds something else.
    """
    name = str(path)
    # Without waiting for a writer, if it is a pipe.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags) if folders is None else _open_inside(name, flags, folders)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NoFileError(f"'{name}' is not a file")
        file = OpenMedia(name, descriptor, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        if content_hash is not None and hash_media(file) != content_hash:
            raise ChangedMediaError(
                f"'{name}' has changed since 'validate' ran: put back what was there, or run the pipelines again"
            )
        yield file
    finally:
        os.close(descriptor)


# A clip may be read for many samples, and an image in every epoch: it is hashed once, while the file stays the same.
@lru_cache(maxsize=1 << 14)
def hash_media(file: OpenMedia) -> str:
    """Return the sha256 of an open file."""
    os.lseek(file.descriptor, 0, os.SEEK_SET)
    with os.fdopen(file.descriptor, "rb", buffering=0, closefd=False) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _open_inside(path: str, flags: int, folders: Sequence[str]) -> int:
    """Open a file by its real path, and look again, once it is open, where that is: links change at any moment."""
    Path(path).stat()  # first of all it must be there
    real = _inside(path, os.path.realpath(path), folders)
    descriptor = os.open(real, flags | os.O_NOFOLLOW)
    try:
        if _OWN_DESCRIPTORS.exists():
            _inside(path, os.path.realpath(_OWN_DESCRIPTORS / str(descriptor)), folders)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _inside(path: str, real: str, folders: Sequence[str]) -> str:
    if not any(os.path.commonpath([real, folder]) == folder for folder in folders):
        raise OutsideFolderError(f"'{path}' leads to '{real}', outside of data_folder")
    return real

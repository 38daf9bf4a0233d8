"""WebDataset shards: tar archives in which neighbours that share a name up to its first dot are one sample.

Read with `tarfile` as a stream, front to back: members become bytes in memory, and never paths. The package
`webdataset` reads with it too, and what it adds (shuffling, decoding, splitting by workers) is done elsewhere here.
Both take a header that is damaged or missing for the end of the archive, and leave out without a word what follows.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from qvl_pipeline.data.rejection import RejectedRowError, quote
from qvl_pipeline.data.sources.embedded import is_embedded
from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.tables import Piece
from qvl_pipeline.data.sources.files.texts import decompressed, position
from qvl_pipeline.data.sources.forms.checked import Row, unknown
from qvl_pipeline.data.sources.forms.conversations import TURN_COLUMNS, Conversation, to_conversation

_PIECE_ROWS = 1024
_MEMBER = pa.struct([("name", pa.string()), ("content", pa.large_binary())])
_SAMPLE = pa.struct([("key", pa.string()), ("members", pa.list_(_MEMBER))])
# As WebDataset has it: the folder and the name up to its first dot, then the extension. Hidden files are no members.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<extension>[^/]+)", re.DOTALL)
# What members are taken for that no row names.
_ENDINGS = {
    "image": {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm"},
    "video": {"mp4", "mov", "m4v", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "wmv", "ogv"},
    "audio": {"wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac"},
}
# Columns that make a JSON a row; that of a caption shard only tells of the picture.
_TURNS = (*TURN_COLUMNS, "instruction")

_Read = tuple[Row | None, str | None]  # a sample, and why there is none


def read_shard(path: Path, limits: Limits) -> Iterator[Piece]:
    """Read all samples of a shard.

    Args:
        path: Tar archive, or several in one file; it may be compressed with gzip or zstd.
        limits: How large pieces and samples may be.

    Yields:
        Pieces in the order of the archive. Records are structs `key`, `members` (`name` and `content` of each).

    Raises:
        ValueError: The archive is damaged, cut off, or holds more than it may.
        tarfile.ReadError: It ends inside of a member.
    """
    with path.open("rb") as raw, _open(decompressed(raw, limits.guard(path))) as archive:
        held: list[_Read] = []
        size = 0
        for sample, problem in _samples(archive, limits):
            held.append((sample, problem))
            size += sum(len(member["content"]) for member in sample["members"]) if sample else 0
            if size >= limits.piece_bytes or len(held) == _PIECE_ROWS:
                yield _piece(held, position(raw))
                held, size = [], 0
        if held:
            yield _piece(held, 1.0)


def read_sample(record: Row, form: str, parse: Callable[[bytes], Row]) -> tuple[Row, Conversation]:
    """Make a row with its conversation of a sample.

    Its `json` is the row. Without turns in that, or without it, a `txt` beside a single image, clip or sound is what
    the assistant says of it, asked nothing.

    Args:
        record: As `read_shard` yields it.
        form: Form that the source states, or `auto`.
        parse: Reads the JSON of a row.

    Returns:
        The row, with `__key__` and the names of `__members__` that nothing uses; and its conversation, in which the
        paths of media are the contents of members.

    Raises:
        RejectedRowError: The sample is no row, or the row is in no known form.
    """
    key = record["key"]
    members = {member["name"][len(key) + 1 :].lower(): member for member in record["members"]}
    media = {kind: [name for name in members if name.rpartition(".")[2] in _ENDINGS[kind]] for kind in _ENDINGS}
    row = {"__key__": key, **(parse(members["json"]["content"]) if "json" in members else {})}
    used = {"json"}
    if "txt" in members and sum(map(len, media.values())) == 1 and all(row.get(name) is None for name in _TURNS):
        row["messages"] = _caption(members["txt"]["content"], next(kind for kind in media if media[kind]))
        used.add("txt")
    elif "json" not in members:
        raise unknown(
            f"its sample {quote(key)} has no member 'json', nor a 'txt' beside one image, clip or sound, but "
            f"{', '.join(map(repr, members))}"
        )
    conversation = to_conversation(row, form)
    if not conversation.media and any(media.values()):
        conversation = to_conversation(row | _columns(media, form), form)
    taken = _taken(conversation, members, strict=any(media.values()))
    if left := sorted(members.keys() - used - {name for name in taken if name}):
        row["__members__"] = left
    found = [
        use._replace(path=members[name]["content"]) if name else use
        for use, name in zip(conversation.media, taken, strict=True)
    ]
    return row, conversation._replace(media=found)


class _Name(NamedTuple):
    """Name of a member, in the two parts that count; without a key it belongs to no sample."""

    key: str | None
    extension: str


def _split(name: str) -> _Name:
    match = _NAME.fullmatch(name)
    return _Name(match["key"], match["extension"].lower()) if match else _Name(None, "")


class _Header(tarfile.TarInfo):
    """A header that says so when it is none: `tarfile` takes what is damaged or missing for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: _Archive) -> _Header:
        try:
            header = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            archive.is_ended = True
            raise
        except tarfile.EmptyHeaderError:
            if archive.is_ended:
                raise
            raise ValueError("it is cut off: it ends without the mark of the end of an archive") from None
        except tarfile.HeaderError as error:
            raise ValueError(f"it is damaged or no tar archive: {error}") from error
        if header.size < 0:
            raise ValueError(f"it is damaged: a member has {header.size} bytes")
        archive.is_ended = False
        return header


class _Archive(tarfile.TarFile):
    """An archive that is read to the end of its file; `is_ended` where the last block was a mark of an end."""

    tarinfo = _Header
    is_ended = False


def _open(content: BinaryIO) -> _Archive:
    # `ignore_zeros`: what comes after the end of an archive is another one.
    return _Archive.open(fileobj=content, mode="r|", ignore_zeros=True, encoding="utf-8", errors="replace")


def _members(archive: _Archive) -> Iterator[tuple[_Name, tarfile.TarInfo]]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # kept for going back, which a stream cannot
        name = _split(member.name)
        if name.key is not None and not member.isdir():
            yield name, member


def _samples(archive: _Archive, limits: Limits) -> Iterator[_Read]:
    seen: set[bytes] = set()
    for key, members in groupby(_members(archive), lambda named: named[0].key):
        digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
        if digest in seen:
            yield None, f"its key {quote(key)} came before: the members of a sample must follow one another"
        else:
            yield _sample(archive, key, members, limits)
        seen.add(digest)


def _sample(archive: _Archive, key: str, members: Iterator[tuple[_Name, tarfile.TarInfo]], limits: Limits) -> _Read:
    """Read a sample; of one that is no good, the rest is skipped."""
    held: dict[str, Row] = {}
    size = 0
    for name, member in members:
        if not member.isreg() or member.issparse():
            return None, f"its member {quote(member.name)} is a link, a device or sparse, not a plain file"
        size += tarfile.BLOCKSIZE + len(member.name) + member.size
        if size > limits.row_bytes:
            return None, limits.too_long()
        if name.extension in held:
            return None, f"its sample {quote(key)} has two members '{name.extension}'"
        held[name.extension] = {"name": member.name, "content": archive.extractfile(member).read()}
    return {"key": key, "members": list(held.values())}, None


def _piece(samples: list[_Read], done: float) -> Piece:
    records, problems = zip(*samples, strict=True)
    return Piece(pa.array(records, _SAMPLE), list(problems) if any(problems) else None, done)


def _caption(content: bytes, kind: str) -> list[Row]:
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RejectedRowError("unreadable_row", "its member 'txt' is not UTF-8") from error
    return [{"role": "user", "content": [{"type": kind}]}, {"role": "assistant", "content": text}]


def _columns(media: dict[str, list[str]], form: str) -> Row:
    """Return the columns that list members in order, in the names of the form."""
    return {kind if form == "llava" else f"{kind}s": names for kind, names in media.items() if names}


def _taken(conversation: Conversation, members: dict[str, Row], *, strict: bool) -> list[str | None]:
    """Return the member that each medium is; `None` of one that is embedded, or in a file if no member is a medium."""
    known = {name: name for name in members}
    for name, member in members.items():
        known |= {member["name"]: name, member["name"].rpartition("/")[2]: name}
    taken = []
    for use in conversation.media:
        path = use.path if isinstance(use.path, str) else ""
        taken.append(known.get(path) or known.get(path.lower()))
        if strict and taken[-1] is None and not is_embedded(use.path):
            raise unknown(f"it names {quote(path)}, which is none of the members of its sample: {', '.join(members)}")
    return taken

"""Digests by which a reader notices what is not what was written.

They are written with what they are of: into the metadata of Arrow batches, a JSON file itself, or `digests.json` of a
folder. Against accidents they need not be cryptographic, but fast: XXH3 reads 5 GB/s of one core, CRC-32 1.5 GB/s,
BLAKE2 and SHA-256 0.5 GB/s (`python -m benchmarks.digests`). All of them let other threads run. A bare GPU node may do
without the package `xxhash`; it writes CRC-32, which every Python has.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from qvl_pipeline.errors import UserError

try:
    from xxhash import xxh3_64
except ModuleNotFoundError:
    xxh3_64 = None

logger = logging.getLogger(__name__)

# In a folder: the digest of each of its files, by name.
DIGESTS = "digests.json"
# Of a JSON object: the key of its own digest. In a list, because DVC takes any text in a file of metrics for a metric.
_SEAL = "digest"
_READ_BYTES = 1 << 20
_THREADS = 8

Piece = bytes | memoryview


class DamagedError(UserError):
    """What is read is not what was written; the message names the file."""


def damaged(path: Path, reason: str, advice: str = "") -> DamagedError:
    """Return the error that names a damaged file, and what to do."""
    return DamagedError(f"{path} is damaged ({reason})" + (f": {advice}" if advice else ""))


class _Hasher(Protocol):
    def update(self, data: Piece, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Piece, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


# By the name that a digest begins with; the first that is installed is written.
_HASHERS: dict[str, Callable[[], _Hasher] | None] = {"xxh3": xxh3_64, "crc32": _Crc32}


def digest_of(parts: Iterable[Piece]) -> str:
    """Return the digest of some bytes, such as `xxh3:8f2c…`; where one part ends and the next begins does not count."""
    name = next(name for name, hasher in _HASHERS.items() if hasher is not None)
    return _digest(name, parts)


def agrees(recorded: str, parts: Iterable[Piece]) -> bool:
    """Return whether bytes have a recorded digest; so they are taken to, when what it is computed with is not here."""
    name = recorded.partition(":")[0]
    if name in _HASHERS and _HASHERS[name] is None:
        _say_unchecked(name)
        return True
    return name in _HASHERS and _digest(name, parts) == recorded


def file_parts(path: Path) -> Iterable[memoryview]:
    """Yield what is in a file, piece by piece; a piece is valid until the next one is asked for."""
    piece = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            yield piece[:size]


def write_digests(folder: Path) -> None:
    """Write `digests.json` into a folder: the digest of every other file in it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    _write(folder, {name: digest_of(file_parts(folder / name)) for name in names if name != DIGESTS})


def add_digest(folder: Path, name: str) -> None:
    """Take one more file into the `digests.json` of a folder, if it has one; the digests of the others stay."""
    if (folder / DIGESTS).exists():
        _write(folder, read_sealed(folder / DIGESTS)["files"] | {name: digest_of(file_parts(folder / name))})


def _write(folder: Path, digests: Mapping[str, str]) -> None:
    text = json.dumps(sealed({"files": dict(sorted(digests.items()))}), indent=2)
    (folder / DIGESTS).write_text(f"{text}\n", encoding="utf-8")


def damage_in(folder: Path) -> str | None:
    """Say which file of a folder with `digests.json` is not what was written; nothing when there is no such file."""
    if not (folder / DIGESTS).exists():
        return None
    try:
        digests = read_sealed(folder / DIGESTS).get("files", {})
    except DamagedError as error:
        return str(error)
    return damage_of(folder, digests)


def damage_of(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Say which of some files of a folder is not what was written, the first of them; read side by side."""

    def damage(item: tuple[str, str]) -> str | None:
        path = folder / item[0]
        try:
            return (
                None if agrees(item[1], file_parts(path)) else f"{path} is not what was written: it was damaged since"
            )
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(damage, sorted(digests.items()))), None)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its own digest in it."""
    return {**values, _SEAL: [digest_of([_canonical(values)])]}


def unsealed(values: Any, path: Path) -> Any:
    """Return a JSON object without its digest; what has none is returned as it is.

    Raises:
        DamagedError: The digest is another one.
    """
    if not isinstance(values, dict):
        return values
    if _SEAL not in values:
        if any(isinstance(value, list) and value[:1] and _is_digest(value[0]) for value in values.values()):
            raise damaged(path, "its digest has another name")
        return values
    rest = {key: value for key, value in values.items() if key != _SEAL}
    recorded = values[_SEAL]
    if not (isinstance(recorded, list) and recorded and agrees(str(recorded[0]), [_canonical(rest)])):
        raise damaged(path, "it is not what was written")
    return rest


def read_sealed(path: Path) -> Any:
    """Read a JSON file, and check the digest that is in it.

    Raises:
        DamagedError: It is no JSON, or not what was written.
        FileNotFoundError: There is no such file.
    """
    try:
        return unsealed(json.loads(path.read_bytes()), path)
    except ValueError as error:  # also text that is no UTF-8
        raise damaged(path, str(error)) from error


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.partition(":")[0] in _HASHERS


def _canonical(values: Mapping[str, Any]) -> bytes:
    # As it comes out of a file: there, keys are texts.
    return json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode()


def _digest(name: str, parts: Iterable[Piece]) -> str:
    hasher = _HASHERS[name]()
    for part in parts:
        hasher.update(part)
    return f"{name}:{hasher.hexdigest()}"


@cache
def _say_unchecked(name: str) -> None:
    logger.warning("digests of the kind %s are not checked here: the package xxhash is not installed", name)

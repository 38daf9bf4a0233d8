"""Media that come inside of a row: written once, to a file that is named by its content."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
from pathlib import Path

from qvl_pipeline.data.rejection import RejectedRowError, quote

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+)/(?P<subtype>[\w.+-]+)(;[^,;]*)*;base64,", re.IGNORECASE)
_SUFFIX = re.compile(r"[a-z0-9]{1,5}")


def is_embedded(reference: str | bytes) -> bool:
    """Whether a row holds the medium itself: as bytes, or as a data URL (RFC 2397)."""
    return isinstance(reference, bytes) or reference[:5].lower() == "data:"


def store_embedded(reference: str | bytes, kind: str, folder: Path) -> Path:
    """Write an embedded medium, unless a file with its content is there.

    Args:
        reference: Content as bytes, or a data URL with base64.
        kind: `image`, `video` or `audio`.
        folder: Where to write.

    Returns:
        `folder/<two digits>/<sha256>`, with the ending that the data URL gives by its type.

    Raises:
        RejectedRowError: The content is empty, not base64, or of another kind (`embedded_media_invalid`).
    """
    content, suffix = (reference, "") if isinstance(reference, bytes) else _decode(reference, kind)
    if not content:
        raise _invalid(f"the embedded {kind} is empty")
    digest = hashlib.sha256(content).hexdigest()
    path = folder / digest[:2] / f"{digest}{suffix}"
    if not path.exists():
        _write(path, content)
    return path


def _decode(url: str, kind: str) -> tuple[bytes, str]:
    match = _DATA_URL.match(url)
    if match is None:
        raise _invalid(f"{quote(url)} is no data URL with a type and base64")
    if match["type"].lower() != kind:
        raise _invalid(f"{quote(url)} is of type '{match['type']}', not {kind}")
    try:
        content = base64.b64decode("".join(url[match.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid(f"{quote(url)} is not base64 ({error})") from error
    subtype = match["subtype"].lower()
    return content, f".{subtype}" if _SUFFIX.fullmatch(subtype) else ""


def _write(path: Path, content: bytes) -> None:
    """Write a file that another process may be writing too: each a file of its own, the last one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(content)
    # Others may read it, unlike a temporary file.
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _invalid(detail: str) -> RejectedRowError:
    return RejectedRowError("embedded_media_invalid", detail)

"""Media inside of rows become files that are named by their content, or a named reject."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from qvl_pipeline.data.rejection import RejectedRowError
from qvl_pipeline.data.sources.embedded import is_embedded, store_embedded

CONTENT = b"\x89PNG and more"
BASE64 = base64.b64encode(CONTENT).decode()
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize(
    ("reference", "suffix"),
    [
        (f"data:image/png;base64,{BASE64}", ".png"),
        (f"DATA:IMAGE/PNG;charset=utf-8;BASE64,{BASE64[:8]}\n{BASE64[8:]}", ".png"),
        (f"data:image/svg+xml;base64,{BASE64}", ""),
        (CONTENT, ""),
    ],
)
def test_content_names_the_file(tmp_path: Path, reference: str | bytes, suffix: str) -> None:
    assert is_embedded(reference)
    path = store_embedded(reference, "image", tmp_path)
    assert path == tmp_path / HASH[:2] / f"{HASH}{suffix}"
    assert path.read_bytes() == CONTENT


def test_the_same_content_is_written_once(tmp_path: Path) -> None:
    path = store_embedded(CONTENT, "image", tmp_path)
    written = path.stat()
    assert store_embedded(CONTENT, "image", tmp_path) == path
    assert path.stat().st_ino == written.st_ino
    assert [file.name for file in path.parent.iterdir()] == [HASH]


@pytest.mark.parametrize("reference", ["data.png", "a/data:b.png", "datas:1", ""])
def test_a_path_is_not_embedded(reference: str) -> None:
    assert not is_embedded(reference)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (b"", "the embedded image is empty"),
        ("data:image/png;base64,", "the embedded image is empty"),
        ("data:image/png;base64,AAA", "is not base64 (Incorrect padding)"),
        ("data:image/png;base64,AA*A", "is not base64 ("),
        ("data:image/png;base64,é", "is not base64 ("),
        ("data:image/png,%89PNG", "is no data URL with a type and base64"),
        ("data:;base64,AAAA", "is no data URL with a type and base64"),
        ("data:", "is no data URL"),
        ("data:video/mp4;base64,AAAA", "is of type 'video', not image"),
        ("data:text/html;base64,AAAA", "is of type 'text', not image"),
    ],
)
def test_what_cannot_be_decoded_is_named(tmp_path: Path, reference: str | bytes, reason: str) -> None:
    with pytest.raises(RejectedRowError) as caught:
        store_embedded(reference, "image", tmp_path)
    assert caught.value.rule == "embedded_media_invalid"
    assert reason in caught.value.detail
    assert list(tmp_path.iterdir()) == []

"""A corpus of bad media: each file is named by its rule, nothing crashes or hangs, and the counts add up."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest
from PIL import Image

from qvl_pipeline.config import ValidateConfig
from qvl_pipeline.data.tables import REJECTS, SAMPLES
from qvl_pipeline.data.validation.validate import validate_samples
from tests.data.samples import as_file
from tests.media.clips import write_clip
from tests.media.files import cut, write_image, write_png_bomb, write_video

CONFIG = ValidateConfig(max_image_pixels=1_000_000, probe_timeout_s=20)


def _written(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", b"x" * 100)
    return buffer.getvalue()


def _flipped(path: Path, start: float, length: int) -> None:
    """Overwrite bytes in the middle of a file by others."""
    data = bytearray(path.read_bytes())
    at = int(len(data) * start)
    data[at : at + length] = bytes(255 - byte for byte in data[at : at + length])
    path.write_bytes(data)


def _truncated_video(path: Path, share: float) -> None:
    cut(write_video(path, frames=40, movflags="faststart"), share)


def _cut_transport_stream(path: Path) -> None:
    write_clip(path.with_suffix(".ts"), [n / 10 for n in range(20)])
    path.write_bytes(path.with_suffix(".ts").read_bytes()[:400])


def _deep(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(path)


def _float_tiff(path: Path) -> None:
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(path, format="TIFF")


def _sound(path: Path) -> None:
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))


def _link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


MP4_HEADER = b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2"
HTML = b"<!doctype html><html><body>404 Not Found</body></html>"
# (rule, file name, how it is made)
BAD: list[tuple[str, str, Callable[[Path], object]]] = [
    ("missing_media", "nowhere.png", lambda path: None),
    ("missing_media", "nowhere.mp4", lambda path: None),
    ("missing_media", "folder.png", lambda path: path.mkdir()),
    ("missing_media", "dangling.png", _link("gone.png")),
    ("missing_media", "loop.png", _link("loop.png")),
    ("empty_media", "empty.png", _written(b"")),
    ("empty_media", "empty.mp4", _written(b"")),
    ("undecodable_media", "text.png", _written(b"not a picture")),
    ("undecodable_media", "page.jpg", _written(HTML)),
    ("undecodable_media", "page.mp4", _written(HTML)),
    ("undecodable_media", "magic.png", _written(b"\x89PNG\r\n\x1a\n")),
    ("undecodable_media", "magic.jpg", _written(b"\xff\xd8\xff\xe0")),
    ("undecodable_media", "magic.gif", _written(b"GIF89a")),
    ("undecodable_media", "magic.webp", _written(b"RIFF\x00\x00\x00\x00WEBP")),
    ("undecodable_media", "magic.mp4", _written(MP4_HEADER)),
    ("undecodable_media", "zip.png", _written(_zip())),
    ("undecodable_media", "gzip.png", _written(gzip.compress(b"x" * 1000))),
    ("undecodable_media", "zeros.png", _written(bytes(5000))),
    ("undecodable_media", "zeros.mp4", _written(bytes(5000))),
    ("undecodable_media", "half.png", lambda path: cut(write_image(path, 64, 64), 0.5)),
    ("undecodable_media", "half.jpg", lambda path: cut(write_image(path, 64, 64), 0.5)),
    ("undecodable_media", "half.webp", lambda path: cut(write_image(path, 64, 64), 0.5)),
    ("undecodable_media", "no_moov.mp4", lambda path: cut(write_video(path, frames=40), 0.5)),
    ("undecodable_media", "header.ts.mp4", _cut_transport_stream),
    ("undecodable_media", "sound.mp4", _sound),
    ("undecodable_media", "image_bytes.png", lambda path: (write_image(path), _flipped(path, 0.5, 20))),
    ("undecodable_media", "truncated.mp4", lambda path: _truncated_video(path, 0.6)),
    ("image_too_large", "bomb.png", lambda path: write_png_bomb(path, 40_000)),
    ("image_too_large", "huge.png", lambda path: write_image(path, 1100, 1000)),
    ("image_too_large", "huge.mp4", lambda path: write_video(path, frames=2, width=1200, height=900)),
    ("aspect_ratio", "stripe.png", lambda path: write_image(path, 500, 2)),
    ("too_few_frames", "one.mp4", lambda path: write_video(path, frames=1)),
    ("absurd_fps", "slow.mp4", lambda path: write_clip(path, [0, 500], time_base=Fraction(1, 90_000))),
    ("deep_image", "deep.png", _deep),
    ("deep_image", "float.png", _float_tiff),
]


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _row(number: int, path: str, question: str) -> dict[str, object]:
    kind = "video" if path.endswith(".mp4") else "image"
    content = [{"type": kind}, {"type": "text", "text": question}]
    answer = [{"type": "text", "text": "This."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    media = [{"type": kind, "path": path}]
    sample = {"sample_id": f"s/{number}", "source": "s", "row": number, "split": "train"}
    return sample | {"messages": orjson.dumps(messages).decode(), "media": media}


def test_every_bad_file_is_named_by_its_rule_and_no_good_one_is(tmp_path: Path) -> None:
    for _, name, make in BAD:
        make(Path(name))
    good = ["good.png", "good.jpg", "good.mp4"]
    write_image(Path("good.png"))
    write_image(Path("good.jpg"), seed=1)
    write_video(Path("good.mp4"))
    names = [name for _, name, _ in BAD] + good
    samples = pa.Table.from_pylist([_row(n, name, f"Which {n}?") for n, name in enumerate(names)], SAMPLES)
    outcome = validate_samples(as_file(samples), REJECTS.empty_table(), CONFIG, batch_rows=10)
    found = dict(zip(outcome.quarantine["row"].to_pylist(), outcome.quarantine["rule"].to_pylist(), strict=True))
    assert {names[row]: rule for row, rule in found.items()} == {name: rule for rule, name, _ in BAD}
    details = dict(zip(outcome.quarantine["row"].to_pylist(), outcome.quarantine["detail"].to_pylist(), strict=True))
    assert all(f"'{names[row]}'" in detail for row, detail in details.items())
    assert outcome.report["counts"] == {
        "ingested": len(names),
        "valid": len(good),
        "quarantined": len(BAD),
        "rejected": 0,
    }
    assert sum(outcome.report["rules"].values()) == len(BAD) >= 25

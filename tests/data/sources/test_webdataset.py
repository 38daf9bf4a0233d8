"""Samples of WebDataset shards become rows with the media beside them; what an archive is made to do, it does not."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
import zstandard

from qvl_pipeline.config import DataEngineConfig, IngestConfig
from qvl_pipeline.data.sources.detection import detect_type
from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.readers import RowFiles
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.errors import UserError

Tables = tuple[list[dict[str, Any]], list[dict[str, Any]]]
Member = tuple[str | tarfile.TarInfo, bytes]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def turns(question: Any, answer: str = "Ho") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sample(key: str, row: Any, **media: bytes) -> list[Member]:
    return [(f"{key}.json", json.dumps(row).encode()), *((f"{key}.{name}", data) for name, data in media.items())]


def ingest(path: str, memory_limit_gib: float = 2.0, **source: Any) -> Tables:
    config = IngestConfig(datasets=[{"name": "a", "path": path, "data_type": "webdataset", **source}])
    engine = DataEngineConfig(memory_limit_gib=memory_limit_gib)
    ingest_sources(config, list_files(config), engine, Path())
    return tuple(pq.read_table(f"{name}.parquet").to_pylist() for name in ("samples", "rejects"))


def ingest_members(*members: Member, **source: Any) -> Tables:
    Path("a.tar").write_bytes(tar(*members))
    return ingest("a.tar", **source)


def contents(row: dict[str, Any]) -> list[tuple[str, bytes]]:
    return [(use["type"], Path(use["path"]).read_bytes()) for use in row["media"]]


def put_aside(row: dict[str, Any]) -> dict[str, Any]:
    return orjson.loads(row["metadata"])


ITEMS = [{"type": "image", "image": "d/1.jpg"}, {"type": "video", "video": "mp4", "video_start": 1.0}]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (turns([*ITEMS, {"type": "text", "text": "Hi"}]), "openai"),
        (turns([{"type": "image", "image": "1.JPG".lower()}, {"type": "video", "video": "MP4"}]), "auto"),
        (turns([{"type": "image"}, {"type": "video"}]), "openai"),
        (turns("<image><video>Hi"), "auto"),
        (turns("<image><video>Hi") | {"images": ["1.jpg"], "videos": ["mp4"]}, "auto"),
        ({"conversations": [{"from": "human", "value": "<image><video>"}, {"from": "gpt", "value": "Ho"}]}, "sharegpt"),
        ({"conversations": [{"from": "human", "value": "<image><video>"}, {"from": "gpt", "value": "Ho"}]}, "llava"),
        ({"instruction": "<image><video>", "output": "Ho"}, "alpaca"),
    ],
)
def test_media_are_the_members_that_a_row_names_or_marks(row: dict[str, Any], form: str) -> None:
    (found,), rejects = ingest_members(*sample("d/1", row, jpg=b"picture", mp4=b"clip"), format=form)
    assert rejects == []
    assert contents(found) == [("image", b"picture"), ("video", b"clip")]
    assert all(use["path"].startswith("data/01_raw/cache/embedded/") for use in found["media"])
    assert (found["sample_id"], found["answer"], found["kind"]) == ("a/0", "Ho", "image_and_video")
    assert put_aside(found) == {"__key__": "d/1"}
    kinds = [item["type"] for item in orjson.loads(found["messages"])[0]["content"] if item["type"] != "text"]
    assert kinds == ["image", "video"]


def test_members_are_taken_in_their_order_and_others_are_put_aside() -> None:
    row = turns("<image><image>")
    media = {"1.png": b"b", "0.png": b"a", "cls": b"7", "txt": b"a text"}
    (found,), _ = ingest_members(*sample("x", row, **media))
    assert contents(found) == [("image", b"b"), ("image", b"a")]
    assert put_aside(found) == {"__key__": "x", "__members__": ["cls", "txt"]}
    (found,), _ = ingest_members(*sample("x", row | {"images": ["0.png", "0.png"]}, **media))
    assert contents(found) == [("image", b"a"), ("image", b"a")]
    assert put_aside(found)["__members__"] == ["1.png", "cls", "txt"]


def test_a_folder_is_read_in_order_and_ids_do_not_depend_on_compression_or_limit() -> None:
    Path("shards").mkdir()
    made = [tar(*(m for n in range(3) for m in sample(f"{n}", turns("Hi", f"{shard}{n}")))) for shard in range(3)]
    Path("shards/00.tar").write_bytes(made[0])
    Path("shards/01.tar.gz").write_bytes(gzip.compress(made[1]))
    Path("shards/02.tar.zst").write_bytes(zstandard.compress(made[2]))
    Path("shards/notes.txt").write_text("no shard")
    rows, _ = ingest("shards")
    assert [row["answer"] for row in rows] == [f"{shard}{n}" for shard in range(3) for n in range(3)]
    assert [row["sample_id"] for row in rows] == [f"a/{n}" for n in range(9)]
    Path("shards/01.tar.gz").rename("shards/01.tar")
    assert ingest("shards")[0] == rows
    assert ingest("shards", limit=4)[0] == rows[:4]


def test_a_caption_beside_a_picture_is_a_row_asked_nothing() -> None:
    samples, rejects = ingest_members(
        *[("1.jpg", b"p1"), ("1.txt", b"A cup.\n")],
        *[*sample("2", {"url": "u", "caption": "x"}, jpg=b"p2"), ("2.txt", "Une tasse à thé.".encode())],
        *[("3.mp4", b"c"), ("3.txt", b"It falls.")],
        *[("4.jpg", b"p"), ("4.png", b"p"), ("4.txt", b"Which?")],
        *[("5.jpg", b"p"), ("5.txt", b"\xff")],
        *[("6.jpg", b"p")],
    )
    assert [orjson.loads(row["messages"]) for row in samples] == [
        [
            {"role": "user", "content": [{"type": kind}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        for kind, text in (("image", "A cup."), ("image", "Une tasse à thé."), ("video", "It falls."))
    ]
    assert [contents(row) for row in samples] == [[("image", b"p1")], [("image", b"p2")], [("video", b"c")]]
    assert put_aside(samples[1]) == {"__key__": "2", "url": "u", "caption": "x"}
    assert [(row["row"], row["rule"]) for row in rejects] == [
        (3, "unknown_format"),
        (4, "unreadable_row"),
        (5, "unknown_format"),
    ]
    assert rejects[0]["detail"] == (
        "row 3: its sample '4' has no member 'json', nor a 'txt' beside one image, clip or sound, "
        "but 'jpg', 'png', 'txt'"
    )


def test_a_bad_sample_is_one_bad_row() -> None:
    good = sample("good", turns("<image>"), jpg=b"p")
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,0"}
    samples, rejects = ingest_members(
        *[("bad.json", b'{"messages": ['), ("bad.jpg", b"p")],
        *[("twice.json", b'{"a": 1, "a": 2}')],
        *sample("other", turns("<image>") | {"image": "cup.jpg"}, jpg=b"p"),
        *[*sample("same", turns("<image>"), jpg=b"p"), ("same.JPG", b"q")],
        *[*sample("link", turns("<image>")), (link("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b"")],
        *[*sample("hard", turns("<image>")), (link("hard.jpg", tarfile.LNKTYPE, "good.jpg"), b"")],
        *[*sample("device", turns("<image>")), (link("device.jpg", tarfile.CHRTYPE, ""), b"")],
        *[*sample("sparse", turns("<image>")), (sparse, b"")],
        *sample("empty", turns("<image>"), jpg=b""),
        *[*good, *sample("good2", turns("Hi")), ("good.png", b"late")],
        *sample("long", turns("x" * 21 * MIB)),
        *sample("last", turns("Hi")),
        memory_limit_gib=1.0,
    )
    assert [(row["row"], row["kind"]) for row in samples] == [(9, "single_image"), (10, "text"), (13, "text")]
    assert [(row["rule"], row["detail"].partition(": ")[2]) for row in rejects[1:]] == [
        ("duplicated_key", "an object in it has the key 'a' twice"),
        ("unknown_format", "it names 'cup.jpg', which is none of the members of its sample: json, jpg"),
        ("unreadable_row", "its sample 'same' has two members 'jpg'"),
        *[
            ("unreadable_row", f"its member '{name}.jpg' is a link, a device or sparse, not a plain file")
            for name in ("link", "hard", "device", "sparse")
        ],
        ("embedded_media_invalid", "the embedded image is empty"),
        ("unreadable_row", "its key 'good' came before: the members of a sample must follow one another"),
        (
            "unreadable_row",
            "it takes more than the 20 MiB that data_engine.memory_limit_gib allows",
        ),
    ]
    assert "row 0: it is not JSON (" in rejects[0]["detail"]


def test_names_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path.parent / "secret.jpg"
    names = ["../../out", str(tmp_path / "out"), "a/../../out", "\udcff"]
    members = [member for name in names for member in sample(name, turns("<image>"), jpg=name.encode(errors="replace"))]
    samples, rejects = ingest_members(
        *[(".hidden.json", b"{}"), ("._1.json", b"{}"), ("README", b"x")],
        *members,
        *sample("outside", turns("<image>") | {"image": str(secret)}),
        data_folder="media",
    )
    assert [contents(row)[0][1] for row in samples] == [name.encode(errors="replace") for name in names]
    assert [reject["rule"] for reject in rejects] == ["path_outside_data_folder"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "data", "samples.parquet", "rejects.parquet"}
    assert not list(tmp_path.parent.glob("out*"))


def _patched_size(size: bytes) -> bytes:
    """An archive whose first member has another size, with a checksum that is right."""
    header = bytearray(tar(*sample("a", turns("Hi")), form=tarfile.GNU_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def _packed(kind: bytes, mib: int) -> bytes:
    """A member of so many mebibytes of zeros, in a few kilobytes."""
    header = link("a.jpg", kind, "")
    header.size = mib * MIB
    return zstandard.compress(header.tobuf(tarfile.GNU_FORMAT)) + zstandard.compress(bytes(MIB)) * mib


SHARD = tar(*(m for n in range(9) for m in sample(f"{n}", turns("<image>"), jpg=b"p" * 3000)))
BAD = {
    "in a member": (SHARD[:20_000], "unexpected end of data"),
    "in a header": (SHARD[: 512 * 9 + 100], "it is damaged or no tar archive: truncated header"),
    "between members": (SHARD[: 512 * 9], "it is cut off: it ends without the mark of the end of an archive"),
    "in gzip": (gzip.compress(SHARD)[:-20], "Compressed file ended before"),
    "empty": (b"", "it is cut off"),
    "text": (b'{"messages": []}\n' * 99, "it is damaged or no tar archive: invalid header"),
    "noise inside": (SHARD[: 512 * 9] + b"\x55" * 512 + SHARD[512 * 10 :], "it is damaged or no tar archive"),
    "noise after the end": (SHARD + b"\x55" * 512, "it is damaged or no tar archive: invalid header"),
    "negative": (_patched_size(b"\xff" * 10 + b"\xfe\x00"), "it is damaged: a member has -512 bytes"),
    "terabytes": (_patched_size(b"77777777777\0"), "unexpected end of data"),
    "bomb": (_packed(tarfile.REGTYPE, 1100), "it is a decompression bomb"),
    "long name": (_packed(tarfile.GNUTYPE_LONGNAME, 800), "memory"),
    "long header": (_packed(tarfile.XHDTYPE, 800), "memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_named_and_the_next_one_read(name: str) -> None:
    content, reason = BAD[name]
    Path("bad.tar").write_bytes(content)
    Path("good.tar").write_bytes(SHARD + SHARD)
    with RowFiles(Limits(1 << 30, 1 << 24)) as files:
        with pytest.raises(UserError, match=f"^'bad.tar' cannot be read as webdataset: .*{reason}"):
            list(files.slabs(Path("bad.tar"), "webdataset"))
        slabs = list(files.slabs(Path("good.tar"), "webdataset"))
    # The second archive in the file has the keys of the first.
    assert [why is None for slab in slabs for why in slab.rows["problem"].to_pylist()] == [True] * 9 + [False] * 9


def test_memory_does_not_depend_on_the_length() -> None:
    shard = tar(*(m for n in range(60) for m in sample(f"{n}", turns("<image>"), jpg=bytes([n]) * 200_000)))
    Path("a.tar").write_bytes(shard)
    with RowFiles(Limits(1 << 30, 2_000_000)) as files:
        slabs = list(files.slabs(Path("a.tar"), "webdataset"))
    assert max(slab.rows.nbytes for slab in slabs) < 3_500_000
    done = [slab.done for slab in slabs]
    assert done == sorted(done)
    assert done[-1] == 1.0


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_shard_is_known_by_its_content(pack: Any) -> None:
    Path("some.file").write_bytes(pack(SHARD))
    assert detect_type(Path("some.file")) == "webdataset"


def test_in_a_folder_archives_beside_rows_are_their_media() -> None:
    Path("f").mkdir()
    Path("f/a.tar").write_bytes(SHARD)
    assert detect_type(Path("f")) == "webdataset"
    Path("f/a.jsonl").write_text("{}")
    assert detect_type(Path("f")) == "jsonl"

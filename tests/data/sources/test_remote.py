"""Files behind a URL, on a local S3 server: listed, copied once, and refused in a sentence; nothing secret is shown."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from qvl_pipeline.config import DataEngineConfig, IngestConfig
from qvl_pipeline.data.sources import remote
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.raw import list_files
from qvl_pipeline.data.sources.remote import copy_remote, list_remote
from qvl_pipeline.errors import UserError


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    """An empty bucket `bucket`; the working directory is a new project."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    return fs


def _row(*images: str) -> bytes:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "Which?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]
    return orjson.dumps({"messages": turns}) + b"\n"


def _ingest(source: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the manifest's files, the samples and the rejects."""
    config = IngestConfig(datasets=[source], eval_fraction=0.5)
    files = list_files(config)
    ingest_sources(config, files, DataEngineConfig(), Path())
    return files, pq.read_table("samples.parquet").to_pylist(), pq.read_table("rejects.parquet").to_pylist()


SOURCE = {"name": "a", "path": "s3://bucket/rows", "data_folder": "s3://bucket/media", "data_type": "jsonl"}


def test_rows_and_media_of_a_bucket_become_local_files(s3: fsspec.AbstractFileSystem) -> None:
    s3.pipe(
        {
            "bucket/rows/1.jsonl": _row("x/a.png", "s3://bucket/media/b.png"),
            "bucket/rows/sub/2.jsonl": _row("../media/./b.png"),
        }
    )
    s3.pipe(
        {
            "bucket/rows/notes.txt": b"",
            "bucket/rows-old/1.jsonl": _row(),
            "bucket/media/x/a.png": b"A",
            "bucket/media/b.png": b"B",
        }
    )
    files, samples, rejects = _ingest(SOURCE)
    assert [(file["url"], file["bytes"]) for file in files] == [
        ("s3://bucket/rows/1.jsonl", len(_row("x/a.png", "s3://bucket/media/b.png"))),
        ("s3://bucket/rows/sub/2.jsonl", len(_row("../media/./b.png"))),
    ]
    assert rejects == []
    contents = [[Path(use["path"]).read_bytes() for use in sample["media"]] for sample in samples]
    assert contents == [[b"A", b"B"], [b"B"]]
    paths = {use["path"] for sample in samples for use in sample["media"]}
    assert len(paths) == 2
    assert all(path.startswith("data/01_raw/cache/remote/") and path.endswith(".png") for path in paths)


def test_media_behind_a_url_are_split_as_if_they_were_here(s3: fsspec.AbstractFileSystem) -> None:
    s3.pipe({"bucket/rows": b"".join(_row(f"x/{n}.png") for n in range(12))})
    splits = [
        [sample["split"] for sample in _ingest(SOURCE | {"data_folder": folder})[1]]
        for folder in ("s3://bucket/media/", "s3://bucket/other", "media")
    ]
    assert splits == [splits[0]] * 3
    assert set(splits[0]) == {"train", "eval"}


def test_a_file_is_copied_once_and_again_when_it_changed(
    s3: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.pipe({"bucket/rows": _row("a.png") * 3, "bucket/media/a.png": b"1"})
    copied: list[str] = []
    download = remote._download
    monkeypatch.setattr(remote, "_download", lambda fs, path, *rest: (copied.append(path), download(fs, path, *rest)))
    first = _ingest(SOURCE)
    assert _ingest(SOURCE) == first
    assert copied == ["bucket/rows", "bucket/media/a.png"]
    s3.pipe({"bucket/media/a.png": b"2"})
    _, samples, _ = _ingest(SOURCE)
    assert copied[2:] == ["bucket/media/a.png"]
    assert Path(samples[0]["media"][0]["path"]).read_bytes() == b"2"
    # The split goes by the place of a medium, not by its version.
    assert samples[0]["split"] == first[1][0]["split"]


def test_a_medium_that_is_not_there_is_left_to_validation(s3: fsspec.AbstractFileSystem) -> None:
    s3.pipe({"bucket/rows": _row("none.png") + _row("folder"), "bucket/media/folder/a.png": b"1"})
    _, samples, _ = _ingest(SOURCE)
    assert [sample["media"][0]["path"] for sample in samples] == [
        "s3://bucket/media/none.png",
        "s3://bucket/media/folder",
    ]


def test_endpoint_by_storage_options(
    s3: fsspec.AbstractFileSystem, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    s3.pipe({"bucket/rows": _row("a.png"), "bucket/media/a.png": b"1"})
    _, samples, _ = _ingest({**SOURCE, "storage_options": {"endpoint_url": endpoint}})
    assert Path(samples[0]["media"][0]["path"]).read_bytes() == b"1"


def test_missing_places_and_refusals_are_sentences(s3: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(UserError, match=r"^ingest.datasets\[0\].path: 's3://bucket/rows' does not exist"):
        _ingest(SOURCE)
    with pytest.raises(UserError, match=r"^'nonsense://b' cannot be read \(ValueError: Protocol not known: nonsense\)"):
        list_remote("nonsense://b", {})
    with pytest.raises(UserError, match="check the URL, storage_options, and the credentials") as caught:
        list_remote(
            "s3://bucket/rows",
            {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}},
        )
    assert "the-secret" not in str(caught.value)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.chdir(tmp_path)
    fs = fsspec.filesystem("memory")
    yield fs
    shutil.rmtree(tmp_path, ignore_errors=True)
    fs.rm("/", recursive=True)


def test_any_file_system_of_fsspec_will_do(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/b/rows/1.jsonl": _row("a.png"), "/b/media/a.png": b"1"})
    source = {**SOURCE, "path": "memory://b/rows", "data_folder": "memory://b/media"}
    _, samples, _ = _ingest(source)
    assert Path(samples[0]["media"][0]["path"]).read_bytes() == b"1"


def test_a_copy_that_is_cut_off_is_not_kept(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory.pipe({"/b/a": b"1234"})
    monkeypatch.setattr(type(memory), "get_file", lambda fs, path, copy: Path(copy).write_bytes(b"12"))
    with pytest.raises(UserError, match="'/b/a' has 4 bytes, of which 2 arrived"):
        copy_remote(["memory://b/a"], {}, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []

"""Files behind a URL, on a local S3 server: listed, copied once, and refused in a sentence; nothing secret is shown."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from qvl_pipeline.config import DataEngineConfig, IngestConfig
from qvl_pipeline.data.rejection import RejectedRowError
from qvl_pipeline.data.sources import remote
from qvl_pipeline.data.sources.ingest import ingest_sources
from qvl_pipeline.data.sources.paths import RemoteFolder
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
    monkeypatch.setattr(type(memory), "get_file", lambda fs, path, copy, **_: Path(copy).write_bytes(b"12"))
    with pytest.raises(UserError, match="'/b/a' has 4 bytes, of which 2 arrived"):
        copy_remote(["memory://b/a"], {}, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


class _Server(BaseHTTPRequestHandler):
    """Serves `/media/…`: `away` redirects to another host, `here` to `a.png`; of `short` more is promised than sent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        targets = {"/media/away": f"http://127.0.0.2:{self.server.server_port}/secret", "/media/here": "/media/a.png"}
        if target := targets.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        body = self.headers["Host"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (9 if "short" in self.path else 0)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()
            self.server.silence.wait(20 if "short" in self.path else 0)

    def log_message(self, *_: Any) -> None:
        self.server.asked.append(self.headers["Host"].partition(":")[0])


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("0.0.0.0", 0), _Server)
    server.asked, server.silence = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.silence.set()
    server.shutdown()
    server.server_close()


def test_a_redirect_to_another_host_is_not_followed(
    web: ThreadingHTTPServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"http://127.0.0.1:{web.server_port}/media"
    copies = copy_remote([f"{folder}/{name}" for name in ("a.png", "here", "away")], {}, tmp_path / "cache")
    assert copies.pop(f"{folder}/away") is None
    assert [path.read_text() for path in copies.values()] == [f"127.0.0.1:{web.server_port}"] * 2
    assert set(web.asked) == {"127.0.0.1"}
    assert f"'{folder}/away' redirects to 'http://127.0.0.2:{web.server_port}/secret', another server" in caplog.text


def test_a_server_that_goes_silent_is_given_up(
    web: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SILENCE_S", 1)
    url = f"http://127.0.0.1:{web.server_port}/media/short"
    start = time.monotonic()
    with pytest.raises(UserError, match=f"^'{url}' cannot be read"):
        copy_remote([url], {"client_kwargs": {}}, tmp_path / "cache")
    assert time.monotonic() - start < 15
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_transfer_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = remote._Pace("a.png")
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 29)
    pace.relative_update(9)
    monkeypatch.setattr("time.monotonic", lambda: now + 100)
    with pytest.raises(UserError, match=r"^'a.png' arrives at 0 bytes a second"):
        pace.relative_update(9)
    pace.relative_update(2_000_000)


@pytest.mark.parametrize("name", ["%2e%2e/b.png", "x/%2E./%2e%2e/b.png", "..%2fb.png"])
def test_a_path_that_leaves_a_remote_folder_in_code_is_outside(name: str) -> None:
    with pytest.raises(RejectedRowError, match="outside of 'http://host/media'"):
        RemoteFolder("http://host/media").locate(name)
    assert RemoteFolder("http://host/my%20media").locate("a%20b.png") == "http://host/my%20media/a%20b.png"

"""The manifest: which files are read, and which bytes are in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qvl_pipeline.config import IngestConfig
from qvl_pipeline.data.sources.raw import fingerprint, hash_folder, list_files
from qvl_pipeline.errors import UserError


def _config(*paths: str) -> IngestConfig:
    datasets = [{"name": f"s{number}", "path": path, "data_type": "jsonl"} for number, path in enumerate(paths)]
    return IngestConfig(datasets=datasets)


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/more").mkdir(parents=True)
    for name in ("data/b.jsonl", "data/a.jsonl", "data/more/c.jsonl", "data/notes.txt"):
        Path(name).write_text(name)


def test_files_are_listed_with_their_content(tmp_path: Path) -> None:
    path = "data/a.jsonl"
    entry = {"path": path, "bytes": len(path), "sha256": hashlib.sha256(path.encode()).hexdigest()}
    assert list_files(_config(path, str(tmp_path / path))) == [{"source": "s0", **entry}, {"source": "s1", **entry}]


def test_a_folder_stands_for_its_files_of_the_type_by_name() -> None:
    paths = [entry["path"] for entry in list_files(_config("data"))]
    assert paths == ["data/a.jsonl", "data/b.jsonl", "data/more/c.jsonl"]


def test_a_file_of_rows_in_a_folder_is_read_or_named(caplog: pytest.LogCaptureFixture) -> None:
    Path("data/d.JSONL.GZ").touch()
    assert [entry["path"] for entry in list_files(_config("data"))][-2:] == ["data/d.JSONL.GZ", "data/more/c.jsonl"]
    assert caplog.messages == []
    Path("data/e.Parquet").touch()
    Path("data/f.jsonl.bz2").touch()
    list_files(_config("data"))
    (message,) = caplog.messages
    assert message.startswith(
        "ingest.datasets[0].path: 'data' also holds 2 files that are not jsonl and are not read, the first is 'e.Parq"
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("data/none.jsonl", "'data/none.jsonl' does not exist"),
        ("empty", r"the folder 'empty' holds no file \*.jsonl"),
    ],
)
def test_missing_source_names_its_parameter(path: str, reason: str) -> None:
    Path("empty").mkdir()
    Path("empty/notes.txt").touch()
    with pytest.raises(UserError, match=rf"^ingest.datasets\[1\].path: {reason}"):
        list_files(_config("data", path))


def test_fingerprint_depends_on_content_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1, "b": 2}) != fingerprint({"a": 1, "b": 3})


def test_hash_of_a_folder_sees_names_and_contents() -> None:
    before = hash_folder(Path("data"), exclude="marker")
    Path("data/marker").touch()
    assert hash_folder(Path("data"), exclude="marker") == before
    Path("data/a.jsonl").write_text("data/A.jsonl")
    changed = hash_folder(Path("data"), exclude="marker")
    Path("data/a.jsonl").rename("data/d.jsonl")
    assert len({before, changed, hash_folder(Path("data"), exclude="marker")}) == 3

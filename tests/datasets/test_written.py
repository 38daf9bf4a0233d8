"""Files and folders that a node writes itself are published whole, or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from kedro.io import DatasetError

from qvl_pipeline.datasets import FileDataset, FolderDataset


def write_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "new.txt").write_text("new")


def fail_half_way(folder: Path) -> None:
    write_folder(folder)
    raise OSError("disk full")


def test_folder_replaces_the_old_content(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "deep" / "folder"))
    assert not dataset.exists()
    dataset.save(write_folder)
    (dataset.load() / "old.txt").write_text("old")
    dataset.save(write_folder)
    assert [path.name for path in dataset.load().iterdir()] == ["new.txt"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_writer_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    dataset.save(lambda folder: folder.mkdir())
    with pytest.raises(DatasetError, match="disk full"):
        dataset.save(fail_half_way)
    assert list(dataset.load().iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_file(tmp_path: Path) -> None:
    dataset = FileDataset(filepath=str(tmp_path / "file"))
    with pytest.raises(DatasetError, match="does not exist"):
        dataset.load()
    dataset.save(lambda path: path.write_text("one"))
    dataset.save(lambda path: path.write_text("two"))
    assert dataset.load().read_text() == "two"


@pytest.mark.parametrize("look", ["exists", "load", "save"])
def test_a_run_killed_while_it_replaced_a_folder_has_replaced_it(tmp_path: Path, look: str) -> None:
    write_folder(tmp_path / ".folder.partial")
    (tmp_path / ".folder.old").mkdir()
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    arguments = [fail_half_way] if look == "save" else []
    with contextlib.suppress(DatasetError):
        getattr(dataset, look)(*arguments)
    assert (dataset.load() / "new.txt").read_text() == "new"


def test_a_folder_that_was_never_finished_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / ".folder.partial").mkdir()
    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    assert not dataset.exists()
    dataset.save(write_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_old_content_that_cannot_be_deleted_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder))

    dataset = FolderDataset(filepath=str(tmp_path / "folder"))
    dataset.save(lambda folder: folder.mkdir())
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        dataset.save(write_folder)
        assert "cannot be deleted: remove it by hand" in caplog.text
        assert (dataset.load() / "new.txt").exists()
        with pytest.raises(DatasetError, match="Operation not permitted"):
            dataset.save(lambda folder: pytest.fail("hours of work, in vain"))
    dataset.save(write_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

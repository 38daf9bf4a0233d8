"""Files and folders that a node writes itself are published whole, or not at all."""

from __future__ import annotations

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

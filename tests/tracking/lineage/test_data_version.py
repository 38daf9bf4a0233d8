from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qvl_pipeline.tracking.lineage import digests
from qvl_pipeline.tracking.lineage.data_version import DataVersion, data_version, dvc_md5


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of one line and a folder of two files, entered."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "folder/inner/b").write_text("b")
    (tmp_path / "folder/ä.txt").write_text("a")
    return tmp_path


def recorded(folder: Path, **out: object) -> None:
    (folder / "dvc.lock").write_text(
        yaml.safe_dump({"stages": {"make": {"cmd": "x", "outs": [{"hash": "md5"} | out]}}})
    )


def test_the_md5_is_that_of_dvc(data: Path) -> None:
    for command in (["init", "--quiet", "--no-scm"], ["add", "--quiet", "rows.jsonl", "folder"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True)
    for name in ("rows.jsonl", "folder"):
        of_dvc = yaml.safe_load((data / f"{name}.dvc").read_text())["outs"][0]["md5"]
        assert dvc_md5(Path(name)) == of_dvc
        assert data_version(Path(name)) == DataVersion(f"md5:{of_dvc.removesuffix('.dir')}", f"{name}.dvc")
    (data / "rows.jsonl").write_text("{} \n")
    assert data_version(Path("rows.jsonl")).origin == "content, not recorded by DVC"


def test_what_lies_outside_of_the_project_has_the_version_of_its_content(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data / "folder")
    assert data_version(data / "rows.jsonl").origin == "content, not recorded by DVC"


def test_what_a_stage_made_is_found_in_the_lock(data: Path) -> None:
    recorded(data, path="folder", md5=dvc_md5(Path("folder")), size=2, nfiles=2)
    assert data_version(data / "folder").origin == "dvc.lock"
    (data / "folder/inner/b").write_text("c")
    changed = data_version(data / "folder")
    assert changed == DataVersion(f"md5:{dvc_md5(Path('folder'))[:-4]}", "content, not recorded by DVC")


def test_data_outside_of_the_project_has_the_digest_of_its_content(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("project"))
    content = f"md5:{dvc_md5(data / 'rows.jsonl')}"
    assert data_version(data / "rows.jsonl") == DataVersion(content, "content, not recorded by DVC")


def test_what_is_inside_of_a_recorded_folder_is_recorded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["init", "--quiet", "--no-scm"], ["add", "--quiet", "folder"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True)
    for name in ("folder/ä.txt", "folder/inner"):
        assert data_version(Path(name)) == DataVersion(f"md5:{dvc_md5(Path(name)).removesuffix('.dir')}", "folder.dvc")
    (data / "folder/ä.txt").write_text("c")
    assert data_version(Path("folder/ä.txt")).origin == "content, not recorded by DVC"
    assert data_version(Path("folder/inner")).origin == "folder.dvc"
    (data / "folder/ä.txt").write_text("a")
    monkeypatch.setattr(digests, "MAX_HASHED_BYTES", 1)
    assert data_version(Path("folder/inner")).origin == "folder.dvc", "its size is small enough to be read"
    assert data_version(Path("folder/inner"), read_all=True).origin == "folder.dvc"
    (data / "folder/inner/b").write_text("bb")
    assert data_version(Path("folder/inner")).digest.startswith("len:")
    (data / "folder/inner/b").write_text("b")
    monkeypatch.setattr(digests, "MAX_HASHED_BYTES", 2**30)
    shutil.rmtree(".dvc/cache")
    assert data_version(Path("folder/inner")).origin == "folder.dvc", "in a clone without the cache"


def test_more_than_can_be_read_is_what_dvc_recorded_if_the_size_is_right(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MAX_HASHED_BYTES", 1)
    recorded(data, path="folder", md5=f"{'0' * 32}.dir", size=2, nfiles=2)
    assert data_version(Path("folder")) == DataVersion(f"md5:{'0' * 32}", "dvc.lock")
    read = data_version(Path("folder"), read_all=True)
    assert read == DataVersion(f"md5:{dvc_md5(Path('folder'))[:-4]}", "content, not recorded by DVC")
    (data / "folder/inner/b").write_text("longer")
    guessed = data_version(Path("folder"))
    assert guessed.digest.startswith("len:")
    assert guessed.origin.startswith("names and sizes")


def test_digests_fit_mlflow(data: Path) -> None:
    assert {len(data_version(Path(name)).digest) for name in ("rows.jsonl", "folder")} == {36}

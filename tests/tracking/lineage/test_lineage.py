from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from qvl_pipeline.tracking.flattening import flattened, numbers
from qvl_pipeline.tracking.lineage import digests
from qvl_pipeline.tracking.lineage.code import dvc_tags, git_tags
from qvl_pipeline.tracking.lineage.digests import content_digest
from qvl_pipeline.tracking.lineage.locked import installed_otherwise


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("x = 1\n")
    (tmp_path / "dvc.lock").write_text("a\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *command], cwd=tmp_path, check=True
        )
    return tmp_path


def test_a_clean_repository_has_a_commit(repository: Path) -> None:
    tags = git_tags(repository)
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["git_dirty"] == "false"


@pytest.mark.parametrize(
    ("path", "dirty"), [("src/code.py", "true"), ("src/new.py", "true"), ("dvc.lock", "false"), ("notes.txt", "false")]
)
def test_only_what_decides_a_result_makes_it_dirty(repository: Path, path: str, dirty: str) -> None:
    (repository / path).write_text("changed\n")
    assert git_tags(repository)["git_dirty"] == dirty


def test_outside_of_a_repository_there_are_no_git_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_tags(tmp_path) == {}
    monkeypatch.setenv("PATH", "")
    assert git_tags(tmp_path) == {}, "a machine without git"


def test_dvc_tags_are_those_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.setenv("DVC_STAGE", "train@tiny_qwen3_vl")
    assert dvc_tags() == {"dvc_stage": "train@tiny_qwen3_vl"}


def test_a_digest_covers_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("one")
    first = content_digest(tmp_path)
    assert len(first) == 36
    assert content_digest(tmp_path) == first
    (tmp_path / "a" / "x").write_text("two")
    second = content_digest(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({first, second, content_digest(tmp_path)}) == 3


def test_a_large_folder_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MAX_HASHED_BYTES", 10)
    (tmp_path / "x").write_text("01234567890")
    digest = content_digest(tmp_path)
    assert digest.startswith("len:")
    (tmp_path / "x").write_text("abcdefghijk")
    assert content_digest(tmp_path) == digest
    (tmp_path / "x").write_text("abcdefghijkl")
    assert content_digest(tmp_path) != digest


def test_what_is_installed_is_compared_with_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lines = ["torch==0.1", f"numpy=={version('numpy')}", "av==0.1 ; python_full_version < '3'", "kedro==0.1"]
    lock.write_text("\n".join(lines))
    assert installed_otherwise(lock) == {"torch": ("0.1", version("torch"))}
    lock.write_text(f"torch=={version('torch').partition('+')[0]}+cu130\n")
    assert installed_otherwise(lock) == {}, "a build for another device"
    assert installed_otherwise(tmp_path / "none") == {}


def test_numbers_of_nested_values_have_joined_names() -> None:
    values = {"a": {"b": 1, "c": {"d": 0.5, "e": "text"}}, "f": True, "g": None, "h": {}}
    assert numbers(values, "/") == {"a/b": 1, "a/c/d": 0.5}
    assert dict(flattened(values, ".")) == {"a.b": 1, "a.c.d": 0.5, "a.c.e": "text", "f": True, "g": None, "h": {}}

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from qvl_pipeline.tracking.lineage.data_version import data_version
from qvl_pipeline.tracking.lineage.dvc_cache import link_by_md5
from qvl_pipeline.tracking.replay.data import get_data
from qvl_pipeline.tracking.replay.repeatable import RecordedRun
from tests.kedro_project import make_project

PROFILE = "replay"
PLAN = Path("data/05_model_input/tiny_qwen3_vl/pack_plan.parquet")
FRAMES = Path("data/05_model_input/tiny_qwen3_vl/video_frames")
MANIFEST = Path("data/01_raw/digits.manifest.json")
DEMO = {"demo": {"folder": "data/01_raw/digits"}, "datasets": [{"path": "data/01_raw/digits/rows.jsonl"}]}
OWN = {"demo": None, "datasets": [{"path": "data/01_raw/own/rows.jsonl"}]}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with DVC, raw data, a plan and frames; no Git."""
    folder = make_project(tmp_path / "project")
    write(folder / MANIFEST, json.dumps({"fingerprint": "raw-1"}))
    write(folder / "data/01_raw/digits/rows.jsonl", "{}")
    write(folder / "data/01_raw/own/rows.jsonl", "{}")
    write(folder / PLAN, "plan")
    write(folder / FRAMES / "0.arrow", "frames")
    write(folder / FRAMES / "more/1.arrow", "more frames")
    monkeypatch.chdir(folder)
    Repo.init(no_scm=True)
    return folder


@pytest.fixture
def worktree(project: Path) -> Path:
    folder = project / "data/replay/run"
    shutil.copytree(project / "conf", folder / "conf")
    write(folder / "conf" / PROFILE / "globals.yml", yaml.safe_dump({"profile": "tiny_qwen3_vl", "dataset": "digits"}))
    return folder


@pytest.fixture
def inputs(project: Path) -> dict[str, str]:
    """What the run read, as it is in the project."""
    return {"pack_plan": data_version(PLAN).digest, "video_frames": data_version(FRAMES).digest}


def got(project: Path, worktree: Path, inputs: dict[str, str], ingest: dict[str, Any]) -> dict[str, str]:
    run = RecordedRun("run", "0", ("train",), "c", "", "tiny_qwen3_vl", "digits", "raw-1", {"ingest": ingest}, inputs)
    return get_data(project, worktree, PROFILE, run, inputs)


def test_what_the_project_has_as_it_was_is_linked(project: Path, worktree: Path, inputs: dict[str, str]) -> None:
    assert got(project, worktree, inputs, DEMO) == dict.fromkeys(inputs, "linked")
    for path in (PLAN, FRAMES / "more/1.arrow", Path("data/01_raw/digits/rows.jsonl")):
        assert (worktree / path).samefile(project / path), "no copy"
    assert not (worktree / MANIFEST).samefile(project / MANIFEST), "a run of ingest writes into it"
    assert (worktree / MANIFEST).read_bytes() == (project / MANIFEST).read_bytes()


def test_another_version_comes_from_the_cache_or_the_remote(
    project: Path, worktree: Path, inputs: dict[str, str], tmp_path: Path
) -> None:
    with Repo() as repo:
        repo.add([str(PLAN), str(FRAMES)])
    (project / PLAN).write_text("another plan")
    shutil.rmtree(project / FRAMES)
    assert got(project, worktree, inputs, DEMO) == dict.fromkeys(inputs, "from DVC")
    assert data_version(worktree / FRAMES).digest == inputs["video_frames"]
    assert (worktree / PLAN).read_text() == "plan"
    # In the cache no longer: fetched, also what of a folder is only partly there.
    shutil.copytree(".dvc/cache", tmp_path / "storage")
    write(project / ".dvc/config.local", f"[core]\nremote = s\n['remote \"s\"']\nurl = {tmp_path / 'storage'}\n")
    for file in Path(".dvc/cache").rglob("*"):
        if file.is_file() and not file.name.endswith(".dir"):
            file.unlink()
    shutil.rmtree(worktree / "data")
    assert got(project, worktree, inputs, DEMO) == dict.fromkeys(inputs, "from DVC")
    assert data_version(worktree / FRAMES).digest == inputs["video_frames"]


def test_one_input_that_is_nowhere_has_all_made_again_and_nothing_linked_to_write_into(
    project: Path, worktree: Path, inputs: dict[str, str]
) -> None:
    (project / PLAN).write_text("another plan")
    assert got(project, worktree, inputs, DEMO) == dict.fromkeys(inputs, "made again")
    assert not (worktree / FRAMES).exists()
    assert (project / FRAMES / "0.arrow").read_text() == "frames"


def test_the_embedded_dataset_is_drawn_again_where_it_may_be_another(
    project: Path, worktree: Path, inputs: dict[str, str]
) -> None:
    (project / MANIFEST).write_text(json.dumps({"fingerprint": "raw-2"}))
    assert got(project, worktree, inputs, DEMO) == dict.fromkeys(inputs, "made again")
    assert not (worktree / "data/01_raw/digits").exists()
    assert (worktree / "data/01_raw/own/rows.jsonl").exists()


def test_raw_data_that_was_added_to_dvc_is_that_of_the_commit(
    project: Path, worktree: Path, inputs: dict[str, str]
) -> None:
    (project / MANIFEST).write_text(json.dumps({"fingerprint": "raw-2"}))
    with Repo() as repo:
        repo.add("data/01_raw/own")
    write(worktree / "data/01_raw/own.dvc", (project / "data/01_raw/own.dvc").read_text())
    for file in (project / "data/01_raw/own").iterdir():
        file.unlink()
    write(project / "data/01_raw/own/rows.jsonl", "{} of now")
    (project / "data/01_raw/own.dvc").unlink()
    assert got(project, worktree, inputs, OWN) == dict.fromkeys(inputs, "linked")
    assert (worktree / "data/01_raw/own/rows.jsonl").read_text() == "{}"
    assert (project / "data/01_raw/own/rows.jsonl").read_text() == "{} of now"


def test_without_dvc_or_with_a_remote_that_fails_data_is_not_there(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    md5 = "0" * 32
    assert not link_by_md5(project, md5, tmp_path / "target")
    assert caplog.text == ""
    write(project / ".dvc/config.local", "[core]\nremote = nowhere\n")
    assert not link_by_md5(project, md5, tmp_path / "target")
    assert "DVC does not have" in caplog.text
    shutil.rmtree(project / ".dvc")
    assert not link_by_md5(project, md5, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_another_file_system_gets_a_copy(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Invalid cross-device link")

    with Repo() as repo:
        repo.add(str(PLAN))
    monkeypatch.setattr(os, "link", refuse)
    assert link_by_md5(project, data_version(PLAN).digest.removeprefix("md5:"), tmp_path / "target")
    assert (tmp_path / "target").read_text() == "plan"

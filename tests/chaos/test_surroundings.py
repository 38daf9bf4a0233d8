"""Machines as one finds them: another encoding, no home, no place for temporary files, few files that may be open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.dvc_repository import make_repository
from tests.kedro_project import REPOSITORY

BARE = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(REPOSITORY / "src"),
    "OMP_NUM_THREADS": "1",
}


def kedro(folder: Path, arguments: str, **environment: str) -> str:
    line = f"ulimit -n 64; exec kedro run {arguments}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=BARE | environment, capture_output=True, timeout=250, check=False
    )
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a long name, and with samples whose folder and text have letters that are not ASCII."""
    folder = tmp_path_factory.mktemp("surroundings") / ("ä" * 40) / ("a long name " * 10).strip()
    project = make_repository(folder)
    kedro(project, "--pipelines ingest", LC_ALL="C.UTF-8", HOME=str(folder.parent))
    return project


def test_a_run_does_not_depend_on_the_locale_a_home_or_where_temporary_files_go(project: Path, tmp_path: Path) -> None:
    samples = project / "data/02_intermediate/digits/samples.parquet"
    expected = samples.read_bytes()
    samples.unlink()
    long = tmp_path / ("x" * 100)
    long.mkdir()
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "HOME": "/proc/no/home"}
    kedro(project, "--pipelines ingest,validate", TMPDIR=str(long), **bare)
    assert samples.read_bytes() == expected
    assert not list(long.glob("qvl-run-*"))


def test_a_source_with_other_letters_is_read_in_another_locale(project: Path) -> None:
    rows = project / "données.jsonl"
    turns = [{"role": "user", "content": "où ?"}, {"role": "assistant", "content": "là"}]
    rows.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    profile = project / "conf" / "accents"
    shutil.copytree(project / "conf" / "tiny_qwen3_vl", profile)
    (profile / "globals.yml").write_text("profile: accents\ndataset: accents\n")
    blocks = yaml.safe_load((profile / "parameters.yml").read_text(encoding="utf-8"))
    blocks["ingest"] = {"datasets": [{"name": "donnees", "path": rows.name, "data_type": "jsonl"}]}
    (profile / "parameters.yml").write_text(yaml.safe_dump(blocks, allow_unicode=True), encoding="utf-8")
    kedro(project, "--pipelines ingest --env accents", LC_ALL="C", PYTHONUTF8="0", TMPDIR="/proc/missing")
    assert (project / "data/02_intermediate/accents/samples.parquet").exists()

"""What a training reads while it runs is not written anew under it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qvl_pipeline.datasets import FolderDataset
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.store import FrameStore, FrameStoreWriter, StoredClip
from qvl_pipeline.training.in_use import READ_WHILE_TRAINING, InUse
from tests.kedro_project import run

HOLD = """
import sys
from pathlib import Path
from qvl_pipeline.training.in_use import InUse
held = InUse(Path(sys.argv[1]), "mine")
held.write() if sys.argv[2:] else held.read()
print("held", flush=True)
sys.stdin.readline()
held.read()
print("written", flush=True)
sys.stdin.readline()
"""


def store(value: int) -> object:
    def write(folder: Path) -> None:
        with FrameStoreWriter(folder) as writer:
            frame = np.full((3, 8, 8), value, dtype=np.uint8).tobytes()
            writer.add(StoredClip("a.mp4", None, None, 8, 8, 1.0, "raw", [0, 1], [0.0, 1.0], [frame, frame]))

    return write


def test_without_a_lock_a_rank_would_read_other_frames_and_no_error(tmp_path: Path) -> None:
    """Why there is one: a shard is opened when it is first needed, and is another one by then."""
    frames = FolderDataset(filepath=str(tmp_path / "video_frames"))
    frames.save(store(1))
    opened = FrameStore(tmp_path / "video_frames")
    frames.save(store(2))
    assert (opened.frames("a.mp4") == 2).all()


@contextmanager
def another_process(folder: Path, *writes: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HOLD, str(folder), *writes]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@contextmanager
def hold(folder: Path) -> Iterator[InUse]:
    held = InUse(folder, "mine")
    yield held
    held.end()


def test_many_read_and_none_writes_under_them(tmp_path: Path) -> None:
    with another_process(tmp_path):
        with hold(tmp_path) as held:
            held.read()
        for refuse in (InUse.write, InUse.check_that_nobody_reads):
            with (
                hold(tmp_path) as held,
                pytest.raises(UserError, match="another run of the profile 'mine', a training o"),
            ):
                refuse(held)
        with hold(tmp_path / "another profile") as held:
            held.write()
    with hold(tmp_path) as held:  # a killed run holds nothing
        held.write()


def test_a_run_that_has_written_all_it_writes_lets_others_train(tmp_path: Path) -> None:
    with another_process(tmp_path, "writes") as process:
        with hold(tmp_path) as held:
            held.check_that_nobody_reads()  # it will be done
            with pytest.raises(UserError, match="'mine' is just writing the tables and frames that this one reads: wa"):
                held.read()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "written\n"
        with hold(tmp_path) as held:
            held.read()
        with hold(tmp_path) as held, pytest.raises(UserError, match="is using the tables and frames that this one wo"):
            held.write()


def test_a_run_is_refused_before_it_writes_under_a_training(project: Path) -> None:
    run(project, "ingest", "tokenize")
    tables = project / "data/05_model_input/tiny_qwen3_vl"
    plan = project / "data/08_reporting/tiny_qwen3_vl/plan_summary.json"
    before = plan.stat().st_mtime_ns
    with another_process(tables):
        run(project, "train")  # which reads, too
        with pytest.raises(UserError, match="another run of the profile 'tiny_qwen3_vl'"):
            run(project, "tokenize")
        assert plan.stat().st_mtime_ns == before
        run(project, "ingest", env="tiny_qwen2_5_vl")
        run(project, "tokenize", env="tiny_qwen2_5_vl")
    run(project, "tokenize")


def test_the_entries_are_those_of_the_training_that_it_does_not_copy() -> None:
    from qvl_pipeline.pipeline_registry import register_pipelines

    made = register_pipelines()["sample"].all_outputs() | register_pipelines()["tokenize"].all_outputs()
    train = register_pipelines()["train"].inputs()
    assert {name for name in made & train if name not in ("pack_plan", "plan_summary")} == READ_WHILE_TRAINING

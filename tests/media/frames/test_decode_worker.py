"""A clip that ends its process is read once more: the machine may have done it. One that does so twice is out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvl_pipeline.media.frames.decode_worker import DecodeWorker, Failure


@pytest.fixture
def worker() -> Iterator[DecodeWorker]:
    worker = DecodeWorker(read_killed, timeout_s=60)
    yield worker
    worker.close()


def read_killed(starts: tuple[Path, int]) -> str:
    """End the process by SIGKILL, as often as is said."""
    path, deaths = starts
    with path.open("a") as file:
        file.write(".")
    if len(path.read_text()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return "read"


def test_a_clip_whose_process_was_killed_is_read_again(worker: DecodeWorker, tmp_path: Path) -> None:
    assert worker.read((tmp_path / "starts", 1)) == "read"
    assert worker.read((tmp_path / "other", 0)) == "read"


def test_a_clip_that_ends_its_process_twice_is_out(worker: DecodeWorker, tmp_path: Path) -> None:
    assert worker.read((tmp_path / "starts", 9)) == Failure("decoder_crashed", "crashed the decoder (exit status -9)")
    assert (tmp_path / "starts").read_text() == ".."
    assert worker.read((tmp_path / "other", 0)) == "read"


def read_for_long(begun: Path) -> None:
    begun.touch()
    threading.Event().wait(600)


def test_a_worker_that_is_closed_does_not_start_again(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    worker = DecodeWorker(read_for_long, timeout_s=600)
    outcomes: list[object] = []
    thread = threading.Thread(target=lambda: outcomes.append(worker.read(begun)))
    thread.start()
    while not begun.exists():
        time.sleep(0.01)
    worker.close()
    thread.join(60)
    assert worker._child is None
    assert isinstance(outcomes[0], Failure)

"""Processes end with the one they work for, also when it is killed while they hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

START = """
import sys, threading, time
sys.path[:] = {path!r}
import tests.test_orphans as orphans

if __name__ == "__main__":
    getattr(orphans, {kind!r})()
    print("hanging", flush=True)
    time.sleep(600)
"""


def hang(*_: object) -> None:
    """Hang as a decoder does: without ever running Python code again."""
    import ctypes

    os.write(2, b"in it\n")
    ctypes.PyDLL(None).sleep(600)  # which keeps the interpreter's lock


def decode() -> None:
    from threading import Thread

    from qvl_pipeline.media.frames.decode_worker import DecodeWorker

    Thread(target=DecodeWorker(hang, timeout_s=600).read, args=(0,), daemon=True).start()


def tokenize() -> None:
    from qvl_pipeline.data.spread import Processes

    orphaned.append(Processes(get_hang, 2))
    orphaned[0].begin()


def get_hang() -> object:
    return hang


orphaned: list[object] = []


@pytest.mark.parametrize("kind", ["decode", "tokenize"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_a_parent_that_was_killed(kind: str, number: int, tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(START.format(path=[str(Path.cwd()), *sys.path], kind=kind))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "hanging\n"
    while parent.stderr.readline() != "in it\n":  # what libraries warn of comes before
        assert parent.poll() is None
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.send_signal(number)
    parent.wait(120)
    deadline = time.monotonic() + 120
    while (left := [child for child in children if child.is_running() and child.status() != "zombie"]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    for child in left:
        child.kill()
    assert left == []

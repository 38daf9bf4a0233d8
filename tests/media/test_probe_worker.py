"""The child process: a decoder that hangs or crashes costs one file, not the run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qvl_pipeline.media.probe import probe_media
from qvl_pipeline.media.probe_worker import ProbeWorker
from tests.media.files import write_image

MAX_PIXELS = 100_000

# Python runs this at the start of the child. Files of these names are what a decoder hangs or crashes on.
SPOILT_DECODER = """
import os, time
from PIL import Image
opened = Image.open
def spoilt(path, **options):
    name = os.path.basename(os.readlink(f"/proc/self/fd/{path.fileno()}"))
    if name == "hang.png":
        time.sleep(60)
    if name == "crash.png":
        os.abort()
    if name == "chatter.png":
        os.write(1, b"printed by a C library\\n")
    return opened(path, **options)
Image.open = spoilt
"""


@pytest.fixture
def spoilt_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SPOILT_DECODER)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.usefixtures("spoilt_decoder")
def test_hang_and_crash_cost_only_their_file(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{name}.png", seed=len(name)) for name in ("a", "hang", "bcd", "crash", "efghij")]
    begin = time.monotonic()
    with ProbeWorker(timeout_s=3.0, max_pixels=MAX_PIXELS) as worker:
        a, hung, b, crashed, c = (worker.probe(str(path), "image") for path in paths)
    assert time.monotonic() - begin < 60, "the decoder sleeps that long"
    assert hung.failure == "took longer than 3 s to probe"
    assert crashed.failure == "crashed the decoder (exit status -6)"
    assert [a, b, c] == [probe_media(str(path), "image", MAX_PIXELS) for path in paths[::2]]


@pytest.mark.usefixtures("spoilt_decoder")
def test_output_of_a_decoder_is_no_answer(tmp_path: Path) -> None:
    path = write_image(tmp_path / "chatter.png")
    with ProbeWorker(timeout_s=60.0, max_pixels=MAX_PIXELS) as worker:
        assert worker.probe(str(path), "image").codec == "png"


def test_no_process_is_left(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    with ProbeWorker(timeout_s=60.0, max_pixels=MAX_PIXELS) as worker:
        worker.probe(str(path), "image")
        child = worker._child
        assert child.poll() is None
    assert child.returncode is not None


def test_child_killed_between_two_files_costs_none(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    with ProbeWorker(timeout_s=60.0, max_pixels=MAX_PIXELS) as worker:
        first = worker.probe(str(path), "image")
        worker._child.kill()
        worker._child.wait()
        assert worker.probe(str(path), "image") == first


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)"])
def test_hung_child_ends_with_its_parent(tmp_path: Path, spoilt_decoder: None, end: str) -> None:
    """Also when the parent exits in the middle of a probe, as it does on SIGTERM, or is killed."""
    path = write_image(tmp_path / "hang.png")
    code = f"""
import os, sys, threading, time
sys.path[:] = {sys.path!r}
from qvl_pipeline.media.probe_worker import ProbeWorker
worker = ProbeWorker(timeout_s=60.0, max_pixels=9)
threading.Thread(target=worker.probe, args=({str(path)!r}, "image"), daemon=True).start()
while worker._child is None:
    time.sleep(0.05)
time.sleep(1.0)
print(worker._child.pid, flush=True)
{end}
"""
    pid = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60).stdout
    deadline = time.monotonic() + 30
    while _runs(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(pid))


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be noticed does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_child_that_does_not_start_is_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    worker = ProbeWorker(timeout_s=60.0, max_pixels=MAX_PIXELS)
    with pytest.raises(RuntimeError, match="does not start"):
        worker.probe("a.png", "image")


@pytest.mark.parametrize("name", ["ünï çødé.png", 'quote".png', "new\nline.png"])
def test_any_file_name(tmp_path: Path, name: str) -> None:
    path = write_image(tmp_path / name)
    with ProbeWorker(timeout_s=60.0, max_pixels=MAX_PIXELS) as worker:
        assert worker.probe(str(path), "image").codec == "png"

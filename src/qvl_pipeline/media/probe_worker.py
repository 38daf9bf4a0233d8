"""Probing in a child process, so that a decoder that hangs or crashes takes nothing but the child along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from qvl_pipeline.media.probe import Probe


class ProbeWorker:
    """A child process that probes one file after the other. It is started anew when a file was its end."""

    def __init__(self, *, timeout_s: float, max_pixels: int) -> None:
        """Set up a worker; its process starts with the first file.

        Args:
            timeout_s: Wall-clock seconds that one file may take.
            max_pixels: A picture with more pixels is not decoded.
        """
        self._timeout_s = timeout_s
        self._max_pixels = max_pixels
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._end()

    def probe(self, path: str, kind: str) -> Probe:
        """Probe one file.

        Args:
            path: File to probe.
            kind: `image` or `video`.

        Returns:
            What was found; a file that took too long or crashed its decoder has that as its `failure`.

        Raises:
            RuntimeError: The child does not start.
        """
        from qvl_pipeline.media.probe import Probe

        child = self._child = self._child or _start()
        expired = threading.Event()
        timer = threading.Timer(self._timeout_s, lambda: (expired.set(), child.kill()))
        timer.start()
        try:
            answer = _ask(child, [path, kind, self._max_pixels])
        finally:
            timer.cancel()
            timer.join()
        status = None if answer and not expired.is_set() else self._end()
        if answer:
            return Probe(**json.loads(answer))
        if expired.is_set():
            return Probe(failure=f"took longer than {self._timeout_s:g} s to probe")
        return Probe(failure=f"crashed the decoder (exit status {status})")

    def _end(self) -> int | None:
        if self._child is None:
            return None
        child, self._child = self._child, None
        with child:
            child.kill()
        return child.returncode


def _start() -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    if not child.stdout.readline():
        raise RuntimeError(f"the process that probes media does not start (exit status {child.wait()})")
    return child


def _ask(child: subprocess.Popen[str], request: list[str | int]) -> str:
    """Return the child's answer, empty when it has died."""
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
    return child.stdout.readline()


def _serve() -> None:
    """Answer requests until there are no more: a JSON list in, a JSON object out, each on a line."""
    from qvl_pipeline.media.probe import probe_media

    # Ctrl-C reaches the whole process group; the parent says what happened.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    # What a C library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    print("ready", file=answers)
    for request in sys.stdin:
        print(json.dumps(asdict(probe_media(*json.loads(request)))), file=answers)


if __name__ == "__main__":
    _serve()

"""Probing in a child process, so that a decoder that hangs or crashes takes nothing but the child along."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from qvl_pipeline.orphans import end_with

if TYPE_CHECKING:
    from qvl_pipeline.media.probe import Probe


class ProbeWorker:
    """A child process that probes one file after the other. It is started anew when a file was its end."""

    def __init__(self, *, timeout_s: float, max_pixels: int, folders: Sequence[str] | None = None) -> None:
        """Set up a worker; its process starts with the first file.

        Args:
            timeout_s: Wall-clock seconds that one file may take.
            max_pixels: A picture with more pixels is not decoded.
            folders: Real paths of the folders that files must be inside of; `None` where they may be anywhere.
        """
        self._timeout_s = timeout_s
        self._max_pixels = max_pixels
        self._folders = folders
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._end()

    def probe(self, path: str, kind: str) -> Probe:
        """Probe one file, and once more where the child ended over it: the machine may have ended it, for its memory.

        Args:
            path: File to probe.
            kind: `image`, `video` or `audio`.

        Returns:
            What was found; a file that took too long or crashed its decoder has that as its `failure`.

        Raises:
            RuntimeError: The child does not start.
        """
        return self._probe_once(path, kind) or self._probe_once(path, kind) or self._crashed()

    def _crashed(self) -> Probe:
        from qvl_pipeline.media.probe import Probe

        return Probe(failure=f"crashed the decoder (exit status {self._status})")

    def _probe_once(self, path: str, kind: str) -> Probe | None:
        """Probe; `None` where the child ended over it."""
        from qvl_pipeline.media.probe import Probe

        if self._child is not None and self._child.poll() is not None:
            self._end()  # killed from outside, in between: not the fault of this file
        child = self._child or self._start()
        expired = threading.Event()
        timer = threading.Timer(self._timeout_s, lambda: (expired.set(), child.kill()))
        timer.daemon = True
        timer.start()
        try:
            answer = _ask(child, [path, kind, self._max_pixels, self._folders])
        finally:
            timer.cancel()
            timer.join()
        self._status = None if answer and not expired.is_set() else self._end()
        if answer:
            return Probe(**json.loads(answer))
        if expired.is_set():
            return Probe(failure=f"took longer than {self._timeout_s:g} s to probe")
        return None

    def _start(self) -> subprocess.Popen[str]:
        watched, held = os.pipe()
        self._alive = os.fdopen(held, "wb")
        child = self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(watched)],
            pass_fds=[watched],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            # The child finds the modules that this process finds, installed or not.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C is for this process, which ends the child: also one that hangs, also when the interpreter exits.
            start_new_session=True,
        )
        os.close(watched)
        weakref.finalize(self, child.kill)
        if not child.stdout.readline():
            raise RuntimeError(f"the process that probes media does not start (exit status {self._end()})")
        return child

    def _end(self) -> int | None:
        if self._child is None:
            return None
        child, self._child = self._child, None
        with contextlib.suppress(BrokenPipeError), child:  # closing its input flushes what it never read
            child.kill()
        self._alive.close()
        return child.returncode


def _ask(child: subprocess.Popen[str], request: list[Any]) -> str:
    """Return the child's answer, empty when it died over it."""
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
    answer = child.stdout.readline()
    return answer if answer.endswith("\n") else ""


def _serve(watched: int) -> None:
    """Answer requests until there are no more: a JSON list in, a JSON object out, each on a line.

    Args:
        watched: Reading end of the pipe that the parent holds: a decoder that hangs ends with the parent, too.
    """
    end_with(watched)
    from qvl_pipeline.media.probe import probe_media

    warnings.simplefilter("ignore")
    # What a C library prints must not end up between the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        os.write(answers, b"ready\n")
        for request in sys.stdin:
            found = probe_media(*json.loads(request))
            os.write(answers, json.dumps(asdict(found)).encode() + b"\n")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

"""Reading clips in a child process, so that a decoder that hangs or crashes takes nothing but the child along."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from qvl_pipeline.errors import UserError
from qvl_pipeline.orphans import end_with_client

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


@dataclass(frozen=True)
class Failure:
    """Why a clip cannot be used.

    Attributes:
        rule: `clip_unfit`, `clip_undecodable`, `clip_changed`, `decode_timeout` or `decoder_crashed`.
        detail: What exactly is wrong.
    """

    rule: str
    detail: str


class ClipError(UserError):
    """A clip breaks a rule of sampling."""

    def __init__(self, rule: str, detail: str) -> None:
        """Name the rule, and what is wrong with the clip."""
        super().__init__(rule, detail)
        self.failure = Failure(rule, detail)


class DecodeWorker:
    """A child process that reads one clip after the other. It is started anew when a clip was its end."""

    def __init__(self, read: Callable[[Any], Any], timeout_s: float) -> None:
        """Set up a worker; its process starts with the first clip.

        Args:
            read: Reads a clip, in the child; both it and what it takes and returns can be pickled.
            timeout_s: Wall-clock seconds that one clip may take.
        """
        # Forked from a clean process that has the imports done: a child starts at once, and inherits no thread or lock.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "qvl_pipeline.media.frames.clips", read_module(read)])
        self._read = read
        self._timeout_s = timeout_s
        self._child: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()  # over who starts and who ends the child
        self._closed = False

    def read(self, clip: Any) -> Any:
        """Read one clip, and once more where the process ended over it: the machine may have ended it, for its memory.

        Args:
            clip: What `read` takes.

        Returns:
            What `read` returns, or a `Failure`.

        Raises:
            RuntimeError: The child does not start, or the worker was closed.
        """
        outcome = self._read_once(clip)
        ended = isinstance(outcome, Failure) and outcome.rule == "decoder_crashed"
        return self._read_once(clip) if ended and not self._closed else outcome

    def _read_once(self, clip: Any) -> Any:
        if self._child is None:
            self._start()
        try:
            self._pipe.send(clip)
            if not self._pipe.poll(self._timeout_s):
                self._end()
                return Failure("decode_timeout", f"took longer than {self._timeout_s:g} s to decode")
            return self._pipe.recv()
        except (EOFError, OSError):
            self._child.join(timeout=5)
            status = self._child.exitcode
            self._end()
            return Failure("decoder_crashed", f"crashed the decoder (exit status {status})")

    def close(self) -> None:
        """End the child, also one that hangs, for good; a `read` that waits for it in another thread returns.

        Of a child that is just being started in another thread nothing is known yet: it is ended there, once it is.
        """
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            child.kill()
            child.join()

    def _end(self) -> None:
        self._child.kill()
        self._child.join()
        self._pipe.close()
        with self._lock:
            self._child = self._pipe = None

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("the worker is closed")
        pipe, other_end = self._context.Pipe()
        child = self._context.Process(target=_serve, args=(other_end, self._read), daemon=True)
        with _interrupts_held_back():
            child.start()
        other_end.close()
        with self._lock:
            self._child, self._pipe = child, pipe
            if self._closed:
                child.kill()
        try:
            self._pipe.recv()  # the time a clip may take does not start before the process has
        except EOFError:
            self._child.join()
            raise RuntimeError(f"a decoding process does not start (exit status {self._child.exitcode})") from None


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let processes that start here never see Ctrl-C: it is for the parent, which ends them.

    The first child starts the server that children are forked from. It takes seconds to import what they need, and an
    interrupt would end it there, with a traceback on the terminal.
    """
    resource_tracker.ensure_running()  # where it is started further down, SIGINT is let through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_module(read: Callable[[Any], Any]) -> str:
    """Name of the module that the child needs for `read`, a function or a `partial` of one."""
    return getattr(read, "func", read).__module__


def _serve(pipe: Connection, read: Callable[[Any], Any]) -> None:
    """Read clips until the parent is gone."""
    end_with_client()  # also when a decoder hangs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.send("ready")
        while True:
            pipe.send(_outcome(pipe.recv(), read))


def _outcome(clip: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(clip)
    except ClipError as error:
        return error.failure
    except UserError as error:
        # Written for whoever reads a file at that moment; the failure is listed, and says by itself what it is about.
        return Failure("clip_undecodable", str(error).partition("; run the pipeline")[0])
    # Decoders raise whatever their parser stumbles over: the clip is bad.
    except Exception as error:
        return Failure("clip_undecodable", f"{type(error).__name__}: {error}")

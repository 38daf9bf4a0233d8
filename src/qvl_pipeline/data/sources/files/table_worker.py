"""Reading tables and shards in a child process with limited memory: a file that is the end of it is named, no more.

A crafted table can make Arrow's readers reach outside of their memory, or ask for any amount of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qvl_pipeline.data.sources.files.limits import Limits

if TYPE_CHECKING:
    from qvl_pipeline.data.sources.files.tables import Piece

# Of the memory that all may take, what the child may; Python and Arrow themselves take 0.15 GiB of it.
_SHARE_OF_MEMORY = 2


class _RefusedError(ValueError):
    """The child cannot read a file."""


class TableReader:
    """A child process that reads one table after the other. It is started anew when a table was its end."""

    def __init__(self, limits: Limits) -> None:
        """Set up a reader; its process starts with the first table."""
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._end()

    def read(self, path: Path, data_type: str) -> Iterator[Piece]:
        """Read all rows of a table.

        Args:
            path: File to read.
            data_type: `parquet`, `arrow` or `hf_dataset`, or `webdataset`.

        Yields:
            Pieces in the order of the file.

        Raises:
            ValueError: The file cannot be read, or not to its end, or was the end of the child.
        """
        import pyarrow as pa

        from qvl_pipeline.data.sources.files.tables import Piece

        child = self._child or self._start()
        finished = False
        try:
            child.stdin.write(json.dumps([str(path), data_type]).encode() + b"\n")
            child.stdin.flush()
            while (answer := self._answer(child)) is not None:
                size = answer.pop("bytes")
                [batch] = pa.ipc.open_stream(pa.py_buffer(child.stdout.read(size)))
                yield Piece(batch.column(0), **answer)
            finished = True
        except _RefusedError:  # the child said so, and is ready for another file
            finished = True
            raise
        finally:
            if not finished:
                self._end()

    def _answer(self, child: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """Return what the child says next; `None` when it has come to the end of the file."""
        line = child.stdout.readline()
        if not line.endswith(b"\n"):
            raise ValueError(
                f"it ended the process that read it (exit status {self._end()}): it is damaged or made to do so, or "
                "needs more memory than data_engine.memory_limit_gib"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise _RefusedError(answer["error"])
        return answer or None

    def _start(self) -> subprocess.Popen[bytes]:
        child = self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._limits.memory_bytes), str(self._limits.slab_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # It finds the modules that this process finds. Of Arrow's allocators, this one asks only for what it needs.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "ARROW_DEFAULT_MEMORY_POOL": "system",
            },
            # Ctrl-C is for this process, which ends the child, also when the interpreter exits.
            start_new_session=True,
        )
        weakref.finalize(self, child.kill)
        if child.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the process that reads tables does not start (exit status {self._end()})")
        return child

    def _end(self) -> int | None:
        if self._child is None:
            return None
        child, self._child = self._child, None
        with contextlib.suppress(BrokenPipeError), child:
            child.kill()
        return child.returncode


def _serve(limits: Limits) -> None:
    """Read files until there are no more to read."""
    # What a C library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit_memory(limits.memory_bytes // _SHARE_OF_MEMORY)
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        _send(answers, b"ready\n")
        for request in sys.stdin:
            for part in _read(*json.loads(request), limits):
                _send(answers, part)


def _limit_memory(size: int) -> None:
    """Have allocations fail beyond a size, where the system can. Files that are mapped are not counted."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _read(path: str, data_type: str, limits: Limits) -> Iterator[bytes]:
    """Yield each piece of a file as a line of JSON and a stream of Arrow, and a line with why it goes no further."""
    import pyarrow as pa

    from qvl_pipeline.data.sources.files.tables import read_table
    from qvl_pipeline.data.sources.files.webdataset import read_shard

    try:
        is_shard = data_type == "webdataset"
        for piece in read_shard(Path(path), limits) if is_shard else read_table(Path(path), data_type, limits):
            batch = pa.record_batch([piece.records], ["record"])
            buffer = pa.BufferOutputStream()
            with pa.ipc.new_stream(buffer, batch.schema) as stream:
                stream.write_batch(batch)
            content = buffer.getvalue()
            yield _line(problems=piece.problems, done=piece.done, bytes=content.size)
            yield memoryview(content)
        yield _line()
    except MemoryError:
        needs = "a part of it needs more memory to be decoded than data_engine.memory_limit_gib allows"
        yield _line(error=f"{needs}: raise that, if you trust the file")
    # Whatever a parser stumbles over: the file is bad.
    except Exception as error:
        yield _line(error=str(error) or type(error).__name__)


def _line(**answer: Any) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _send(answers: Any, part: bytes) -> None:
    answers.write(part)
    answers.flush()


if __name__ == "__main__":
    _serve(Limits(*map(int, sys.argv[1:])))

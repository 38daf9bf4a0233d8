"""Clips and sounds read side by side, in processes that may hang or crash: of this machine, or of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from queue import SimpleQueue
from typing import Any

from qvl_pipeline.data.spread import Begun, RayTasks, in_order
from qvl_pipeline.media.frames.decode_worker import DecodeWorker

# Clips read ahead of the one that is written, for each process.
READ_AHEAD = 2
# Reads a clip, or a sound; it can be pickled.
Read = Callable[[Any], Any]


def read_in_order(
    media: Sequence[Any], readers: DecodeProcesses | RayTasks, cached: Callable[[Any], Any] = lambda _: None
) -> Iterator[Any]:
    """Read media side by side.

    Args:
        media: What is read.
        readers: Who reads; closed at the end.
        cached: Returns what need not be read, or `None`.

    Yields:
        What was read, or a `Failure`, in order.
    """

    def begin(medium: Any) -> Begun:
        if (found := cached(medium)) is None:
            return readers.begin(medium)
        done: Future[Any] = Future()
        done.set_result(found)
        return done

    with closing(readers):
        yield from in_order(begin, media, readers.ahead)


class DecodeProcesses:
    """Decoding processes of this machine.

    Attributes:
        ahead: Clips to begin before the first is taken, which is what memory holds.
    """

    def __init__(self, read: Read, timeout_s: float, size: int) -> None:
        """Set up; each process starts with its first clip.

        Args:
            read: Reads a clip.
            timeout_s: Seconds that one may take.
            size: How many processes.
        """
        self.ahead = READ_AHEAD * size
        self._workers = [DecodeWorker(read, timeout_s) for _ in range(size)]
        self._idle: SimpleQueue[DecodeWorker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(size)

    def begin(self, medium: Any) -> Begun:
        """Begin to read."""
        return self._threads.submit(self._read, medium)

    def close(self) -> None:
        """End the processes, also those that hang."""
        # Not waited for: a thread may be starting a process, which takes seconds, and ends it then.
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _read(self, medium: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.read(medium)
        finally:
            self._idle.put(worker)


def decode_tasks(read: Read, timeout_s: float, *, memory: int, most: int | None) -> RayTasks:
    """Read on the Ray cluster: each of its processes has a decoding process of its own, which may hang or crash.

    Args:
        read: Reads a clip.
        timeout_s: Seconds that one may take.
        memory: Bytes that reading one needs.
        most: Most clips at a time; `None` for as many as the cluster has cores.

    Raises:
        UserError: No node has so much memory.
    """
    return RayTasks(partial(_decoder, read, timeout_s), what="clips", memory=memory, most=most)


def _decoder(read: Read, timeout_s: float) -> Read:
    return DecodeWorker(read, timeout_s).read

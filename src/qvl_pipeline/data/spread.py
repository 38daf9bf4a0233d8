"""Pieces of work done side by side and taken in order: in processes of this machine, or in tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from qvl_pipeline.errors import UserError
from qvl_pipeline.orphans import end_with_client

# Makes, once in each process, what works on pieces there; it can be pickled.
Start = Callable[[], Callable[..., Any]]
# How often a piece is begun again whose process or node was lost.
_RETRIES = 5


class Begun(Protocol):
    """A piece that is worked on: a `Future`, or what is like one."""

    def result(self) -> Any:
        """Wait for what became of it."""


def in_order(begin: Callable[[Any], Begun], pieces: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Work on pieces side by side.

    Args:
        begin: Begins to work on a piece.
        pieces: The pieces.
        ahead: Most pieces that are begun and not yet taken, which is what waits in memory.

    Yields:
        What became of them, in their order.
    """
    begun: deque[Begun] = deque()
    for piece in pieces:
        begun.append(begin(piece))
        if len(begun) == ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def clean_processes(
    size: int, preload: Sequence[str], initializer: Callable[..., None], *arguments: Any
) -> ProcessPoolExecutor:
    """Make a pool of processes that are forked from a clean one, which has the imports done.

    So each starts at once, and inherits no thread or lock.

    Args:
        size: How many processes.
        preload: Modules to import.
        initializer: Is called in each process when it starts.
        *arguments: With these.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(size, context, initializer, arguments)


class Processes:
    """Processes of this machine.

    Attributes:
        ahead: Pieces to begin before the first is taken, so that no process waits for one.
    """

    def __init__(self, start: Start, size: int, preload: Sequence[str] = ()) -> None:
        """Set up; processes start with the first pieces.

        Args:
            start: Makes what works on pieces.
            size: How many processes.
            preload: Modules that `start` needs.
        """
        self.ahead = 2 * size
        self._pool = clean_processes(size, [__name__, *preload], _start_here, start)

    def begin(self, *piece: Any) -> Begun:
        """Begin to work on a piece: what `start` has made is called with it."""
        return self._pool.submit(_work_here, *piece)

    def close(self) -> None:
        """End the processes; what nobody waits for any more is not begun."""
        self._pool.shutdown(cancel_futures=True)


class RayTasks:
    """Tasks of the Ray cluster that `join_cluster` has joined. What a lost node had begun is begun again elsewhere.

    Attributes:
        ahead: Pieces to begin before the first is taken.
    """

    def __init__(self, start: Start, *, what: str, memory: int = 0, most: int | None = None) -> None:
        """Set up.

        Args:
            start: Makes what works on pieces, once in each of the processes that Ray keeps for its tasks.
            what: The pieces in words, for errors.
            memory: Bytes that a task needs; Ray runs no more of them on a node than fit.
            most: Most tasks at a time; `None` for as many as the cluster has cores.

        Raises:
            UserError: No node has so much memory.
        """
        import ray

        self.ahead = most or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        offered = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if memory > offered:
            raise UserError(
                f"{what} need {memory / 2**30:.1f} GiB of memory each, and no node of the Ray cluster offers its tasks "
                f"more than {offered / 2**30:.1f} GiB: add one, or start Ray there with a larger --memory"
            )
        self._what = what
        self._start = ray.put(start)
        self._call = ray.remote(_work_there).options(num_cpus=1, memory=memory or None, max_retries=_RETRIES)
        self._tasks: deque[_Task] = deque()

    def begin(self, *piece: Any) -> Begun:
        """Begin to work on a piece: what `start` has made is called with it."""
        while self._tasks and self._tasks[0].taken:
            self._tasks.popleft()
        # In a list, a reference is passed on as it is: the processes fetch it once, not once a task.
        self._tasks.append(_Task(self._call.remote([self._start], piece), self._what))
        return self._tasks[-1]

    def close(self) -> None:
        """End the tasks that nobody waits for any more, with their processes: they may hang."""
        import ray

        for task in reversed(self._tasks):  # those that wait first: they would begin where another has ended
            if not task.taken:
                with contextlib.suppress(Exception):  # a cluster that is lost has no tasks, and why it is has been said
                    ray.cancel(task.reference, force=True)
        self._tasks.clear()


class _Task:
    def __init__(self, reference: Any, what: str) -> None:
        self.reference, self.taken, self._what = reference, False, what

    def result(self) -> Any:
        """Fetch what became of the piece; until here it stays in the memory of the cluster."""
        from ray.exceptions import RayError, RayTaskError

        try:
            # Not `ray.get`, in which a signal's exception (SIGTERM) would become one of Ray's.
            found = self.reference.future().result()
        except RayTaskError as error:
            raise error.cause from None
        except (RayError, ConnectionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self._what} cannot be worked on on the Ray cluster ({reason}): its nodes need memory, this folder "
                f"({Path.cwd()}) and the packages of this machine; what a lost node had begun was tried {_RETRIES + 1} "
                "times"
            ) from error
        self.taken, self.reference = True, None
        return found


_worker: Callable[..., Any]  # of a process of this machine


def _start_here(start: Start) -> None:
    global _worker
    end_with_client()  # it would wait for work forever: its queue has an end in every one of these processes
    _worker = start()


def _work_here(*piece: Any) -> Any:
    return _worker(*piece)


@lru_cache(maxsize=1)
def _worker_there(start: Any) -> Callable[..., Any]:
    import ray

    return ray.get(start)()


def _work_there(start: list[Any], piece: tuple[Any, ...]) -> Any:
    return _worker_there(start[0])(*piece)

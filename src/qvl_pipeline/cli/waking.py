"""A signal that ends a command is heard at once, also when it comes just before the main thread begins to wait."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# Nothing here sends it otherwise, and it does nothing where no handler is set.
_NUDGE = signal.SIGURG
# Seconds between nudges. The first is usually enough; on a busy machine the main thread may not wait yet.
_PAUSES = (0.1, 0.4, 1.5)


@contextlib.contextmanager
def woken_by_signals() -> Iterator[None]:
    """Have every signal that Python handles interrupt what the main thread waits for; to be entered in that thread.

    Python's handlers run in the main thread, between two of its instructions. A signal that arrives after the last of
    them and before a wait begins is noted, but handled when the wait is over: for a lock or a future, as that of a
    table which Daft's threads make, that can be hours. So a thread that learns of each signal by `signal.set_wakeup_fd`
    nudges the main thread a moment later, when the wait has begun, by another signal.

    A wait that the system goes on with after a signal (as for a mutex) is not interrupted; and an asyncio loop inside
    that adds signal handlers takes the wakeup file descriptor for itself.
    """
    nudged_before = signal.signal(_NUDGE, lambda *_: None)  # first: it is refused in all other threads
    over = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    arguments = (reading, threading.get_ident(), over)
    threading.Thread(target=_nudge, args=arguments, name="signals", daemon=True).start()
    woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        with contextlib.suppress(BlockingIOError):  # full: it has something to read
            os.write(writing, bytes(1))  # closing is not enough where a forked child has this end, too
        over.set()  # and not before: nobody would read then
        os.close(writing)
        signal.signal(_NUDGE, nudged_before)


def _nudge(reading: int, main_thread: int, over: threading.Event) -> None:
    """After each signal, send others to the main thread."""
    with open(reading, "rb", buffering=0) as signals:
        while not over.is_set():
            numbers = signals.read(4096)
            if set(numbers) <= {_NUDGE}:
                continue
            for pause in _PAUSES:
                if over.wait(pause):
                    return
                signal.pthread_kill(main_thread, _NUDGE)

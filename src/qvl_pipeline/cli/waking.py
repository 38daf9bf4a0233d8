"""A signal that ends a command ends it at once, whatever the main thread waits for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Nobody sends this one, and it does nothing where no handler is set.
_NUDGE = signal.SIGURG
# Seconds between the nudges. The first finds the main thread waiting, but where the machine is very busy.
_PAUSES = (0.1, 0.4, 1.5)


@contextmanager
def woken_by_signals() -> Iterator[None]:
    """Have every signal that Python handles interrupt what the main thread waits for; to be entered in that thread.

    Python's handlers run in the main thread, between two of its instructions. A signal that arrives after the last of
    them and before a wait begins is noted, but handled when the wait is over: for a lock, a future or a table that
    others make in their threads, that can be hours. So a thread that learns of each signal by `signal.set_wakeup_fd`
    sends another one a moment later, when the wait has begun.
    """
    heard, noted = os.pipe()
    os.set_blocking(noted, False)
    handler = signal.signal(_NUDGE, lambda *_: None)
    before = signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
    threading.Thread(target=_nudge, args=(heard, threading.get_ident()), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(noted)
        signal.signal(_NUDGE, signal.SIG_IGN if handler is None else handler)


def _nudge(heard: int, thread: int) -> None:
    """Read the signals until the writing end is closed."""
    with open(heard, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] == _NUDGE:
                continue
            for pause in _PAUSES:
                time.sleep(pause)
                signal.pthread_kill(thread, _NUDGE)

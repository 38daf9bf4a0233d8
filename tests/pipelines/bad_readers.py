"""Functions that stand in for reading a clip, in a module that a worker process can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def crash_on_two(number: int) -> int:
    """Die as a decoder with a bad pointer does."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number


def recorder(started: list[int]) -> Callable[[int], int]:
    """Note what was started."""

    def read(number: int) -> int:
        started.append(number)
        return number

    return read

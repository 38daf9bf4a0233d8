"""Stopping on request: a signal asks for it, the loop obeys between two steps, a file says that it did."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from types import FrameType

from qvl_pipeline.engine.signals import STOP_SIGNALS

STOPPED = "stopped.json"


class StopRequest:
    """Whether this process was asked to stop; true from the first signal on.

    SIGTERM from torchrun itself is no request: it ends the ranks of a job of which one has failed, and waits 30 s for
    each that does not go. Who sent a signal is known only to a thread that waits for it.
    """

    def __init__(self) -> None:
        """Start without a request, and listen for `STOP_SIGNALS` instead of ending at them."""
        self.requested = False
        for number in STOP_SIGNALS:  # a thread of a library, older than this, does not block them
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def _listen(self) -> None:
        while True:
            if signal.sigwaitinfo(STOP_SIGNALS).si_pid == os.getppid():
                os._exit(1)
            self.requested = True


def write_stopped(output_dir: Path, step: int) -> None:
    """Say that training stopped on request, and that the checkpoint after `step` (0: none) continues it.

    The ranks end with status 0, because torchrun would count any other as a failure and restart them.
    """
    (output_dir / STOPPED).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")

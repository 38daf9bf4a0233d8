"""Stopping on request: a signal asks for it, the loop obeys between two steps, a file says that it did."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType

# SIGTERM is what `kill`, Kubernetes and SLURM's `scancel` send; SIGUSR1 what `sbatch --signal=USR1@120` is set to send.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
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


def ignore_stop_signals(_worker_id: int = 0) -> None:
    """Ignore the signals: in a loader process, and in a rank that is done.

    Schedulers send them to all processes of a job, and a trainer whose loader is gone cannot finish its step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_loaders() -> None:
    """End the loader processes: one that hangs would outlive its rank, or keep it from ending."""
    for child in multiprocessing.active_children():
        if child.daemon:  # as those of a DataLoader are; what is none is waited for, and ends by itself
            child.kill()


# Python, when it exits, ends child processes by SIGTERM and waits for them; this comes before.
Finalize(None, end_loaders, exitpriority=0)


def write_stopped(output_dir: Path, step: int) -> None:
    """Say that training stopped on request, and that the checkpoint after `step` (0: none) continues it.

    The ranks end with status 0, because torchrun would count any other as a failure and restart them.
    """
    (output_dir / STOPPED).write_text(json.dumps({"step": step}) + "\n")

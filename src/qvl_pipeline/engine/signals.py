"""Signals that ask a training to stop, in processes that are not the one to decide; and the end of loader processes."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.util import Finalize

# SIGTERM is what `kill`, Kubernetes and SLURM's `scancel` send; SIGUSR1 what `sbatch --signal=USR1@120` is set to send.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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

"""Signals that ask a training to stop, in processes that are not the one to decide; and the end of loader processes."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.util import Finalize

from qvl_pipeline.orphans import end_with_parent

# SIGTERM is what `kill`, Kubernetes and SLURM's `scancel` send; SIGUSR1 what `sbatch --signal=USR1@120` is set to send.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_stop_signals() -> None:
    """Ignore the signals: in a rank that is done."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_loader(_worker_id: int) -> None:
    """Prepare a loader process: it ends with its rank, also while it decodes, and not before.

    Schedulers send signals to all processes of a job, and a trainer whose loader is gone cannot finish its step.
    """
    ignore_stop_signals()
    end_with_parent()


def end_loaders() -> None:
    """End the loader processes: one that hangs would outlive its rank, or keep it from ending."""
    for child in multiprocessing.active_children():
        if child.daemon:  # as those of a DataLoader are; what is none is waited for, and ends by itself
            child.kill()


# Python, when it exits, ends child processes by SIGTERM and waits for them; this comes before.
Finalize(None, end_loaders, exitpriority=0)

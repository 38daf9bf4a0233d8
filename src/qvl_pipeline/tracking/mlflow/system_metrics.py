"""What the machine does while a stage works: CPU, memory, disk, network and GPUs, as metrics of the MLflow run."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import Any

logger = logging.getLogger(__name__)

# Of one machine, 10 s apart: a week without a tracking server.
_MOST_UNSENT = 60_000


class SystemMetrics:
    """Samples the machine in a thread of its own until stopped.

    The figures are those of MLflow's monitors, under the same names (`system/cpu_utilization_percentage`). MLflow's own
    thread ends at the first request that fails, and stopping it waits for the server; this one does neither.
    """

    def __init__(self, run_id: str, interval_s: float) -> None:
        """Start sampling for the run `run_id`, the first time after `interval_s` seconds."""
        self._run_id = run_id
        self._interval_s = interval_s
        self._stopped = threading.Event()
        # A daemon: no process stays alive for it.
        self._thread = threading.Thread(target=self._watch, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Send what is left, waiting `timeout_s` seconds at most."""
        self._stopped.set()
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        from qvl_pipeline.tracking.mlflow.run import metric_entries

        monitors, client = _monitors(), MlflowClient()
        unsent: deque[Any] = deque(maxlen=_MOST_UNSENT)
        step = 0
        while not self._stopped.wait(self._interval_s):
            unsent.extend(metric_entries(_sample(monitors), step, time.time()))
            step += 1
            # Entries that were stored all the same are known by their time: they do not become two.
            with contextlib.suppress(MlflowException, OSError):
                client.log_batch(self._run_id, metrics=list(unsent))
                unsent.clear()


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        logger.debug("no GPU is sampled: %s", error)
    _sample(monitors)  # the CPU's first figure has no start to count from
    return monitors


def _sample(monitors: list[Any]) -> dict[str, float]:
    figures = {}
    for monitor in monitors:
        monitor.collect_metrics()
        figures |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return figures

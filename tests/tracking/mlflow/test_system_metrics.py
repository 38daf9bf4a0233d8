from __future__ import annotations

import threading
import time
from typing import Any

import mlflow
import pytest

from qvl_pipeline.tracking.mlflow.system_metrics import SystemMetrics


class Server:
    """Stands in for MLflow's client: it is down for the first requests."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.requests: list[list[Any]] = []

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.requests.append(metrics)
        if len(self.requests) <= self.failures:
            raise mlflow.MlflowException("down")


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("failures", [0, 2])
def test_samples_go_to_the_run_and_wait_while_the_server_is_down(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    server = Server(failures)
    monkeypatch.setattr("mlflow.MlflowClient", lambda: server)
    watched = SystemMetrics("run", interval_s=0.02)
    wait_for(lambda: len(server.requests) > failures)
    watched.stop()
    entries = server.requests[failures]
    cpu = [entry for entry in entries if entry.key == "system/cpu_utilization_percentage"]
    assert [entry.step for entry in cpu] == list(range(failures + 1)), "none is lost, each is sent once"
    assert all(0 <= entry.value <= 100 for entry in cpu)
    assert {"system/system_memory_usage_percentage", "system/disk_usage_percentage"} <= {e.key for e in entries}


def test_a_server_that_hangs_keeps_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, released = threading.Event(), threading.Event()

    class Hanging:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            asked.set()
            released.wait(30)

    monkeypatch.setattr("mlflow.MlflowClient", Hanging)
    watched = SystemMetrics("run", interval_s=0.01)
    assert asked.wait(20)
    started = time.monotonic()
    watched.stop(timeout_s=0.1)
    assert time.monotonic() - started < 15
    assert watched._thread.daemon, "the process ends all the same"
    released.set()

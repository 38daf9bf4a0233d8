"""What a failing MLflow server costs a training: its time beside a server that works, and beside one that fails.

The training is a process that computes a fixed number of steps and appends a row for each, as the engine does; it is
followed as `train` follows it. The server is a real one, behind a proxy that drops, refuses and delays every request
that writes while the training runs.

    python -m benchmarks.tracking
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.tracking.server import FaultyProxy, mlflow_server

from benchmarks.report import report

STEPS = 60
REPEATS = 3
# A step is arithmetic and not sleep, so that a sender which takes the CPU is seen.
ENGINE = """
import json, sys, time
started = time.perf_counter()
with open(sys.argv[1], "a") as file:
    for step in range(1, int(sys.argv[2]) + 1):
        sum(range(3_000_000))
        row = {"step": step, "time": time.time(), "loss": 1 / step, "loss_by_source": {str(i): 0.5 for i in range(30)}}
        file.write(json.dumps(row) + "\\n")
        file.flush()
print(time.perf_counter() - started)
"""


def train(models: Path, proxy: FaultyProxy, *, failing: bool) -> dict[str, Any]:
    """Run one training, and send afterwards what is unsent; the row says what it took and what MLflow has."""
    from mlflow import MlflowClient

    from qvl_pipeline.tracking.sinks import MetricsSink, SendToMlflow
    from qvl_pipeline.tracking.unsent import send_unsent

    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    path = models / "base" / "scratch" / run_id / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    sink = MetricsSink("mlflow", run_id, path, SendToMlflow(run_id))
    requests = len(proxy.happened)
    proxy.failing = failing
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, path, str(STEPS)], stdout=subprocess.PIPE, text=True)
    while engine.poll() is None:
        sink.poll()
        time.sleep(0.2)
    unsent = sink.close(timeout_s=2)
    proxy.failing = False
    send_unsent(models)
    history = client.get_metric_history(run_id, "train/loss")
    return {
        "server": "fails" if failing else "works",
        "training_s": float(engine.communicate()[0]),
        "failed_requests": len(proxy.happened) - requests,
        "rows_unsent_at_end": unsent,
        "steps_in_mlflow": len({point.step for point in history}),
        "steps_more_than_once": len(history) - len({point.step for point in history}),
    }


def main() -> None:
    """Alternate trainings beside a server that works and one that fails."""
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
    import mlflow

    with (
        tempfile.TemporaryDirectory() as name,
        mlflow_server(f"sqlite:///{name}/mlflow.db", Path(name)) as port,
        FaultyProxy(port) as proxy,
    ):
        mlflow.set_tracking_uri(proxy.uri)
        models = Path(name) / "models"
        rows = [train(models, proxy, failing=failing) for _ in range(REPEATS) for failing in (False, True)]
    seconds = {
        server: median(row["training_s"] for row in rows if row["server"] == server) for server in ("works", "fails")
    }
    whole = sum(row["steps_in_mlflow"] == STEPS and row["steps_more_than_once"] == 0 for row in rows)
    report(
        "tracking",
        rows,
        ratios={"time_beside_a_failing_server": seconds["fails"] / seconds["works"], "curves_whole": whole / len(rows)},
        targets={"time_beside_a_failing_server": "<= 1.05", "curves_whole": "1"},
    )


if __name__ == "__main__":
    main()

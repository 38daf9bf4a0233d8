"""What a failing MLflow server costs a training: its time beside a server that works, and beside one that fails.

The training is a process that computes a fixed number of steps and appends a row for each, as the engine does; it is
followed as `train` follows it. The server is a real one, behind a proxy that drops, refuses and delays every request
that writes while the training runs.

Trainings beside the one and the other follow each other in rounds, and the figure is the median of the rounds' ratios:
another process that slows a round slows both. The CPU time of the training tells a sender that makes it do more from
one that takes its turn on the CPU, which only the wall time shows.

    python -m benchmarks.tracking [--rounds 7] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
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

# A step is arithmetic and not sleep, so that a sender which takes the CPU is seen.
ENGINE = """
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
with open(sys.argv[1], "a") as file:
    for step in range(1, int(sys.argv[2]) + 1):
        sum(range(3_000_000))
        row = {"step": step, "time": time.time(), "loss": 1 / step, "loss_by_source": {str(i): 0.5 for i in range(30)}}
        file.write(json.dumps(row) + "\\n")
        file.flush()
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


def train(models: Path, proxy: FaultyProxy, steps: int, *, failing: bool) -> dict[str, Any]:
    """Run one training, and send afterwards what is unsent; the row says what it took and what MLflow has."""
    from mlflow import MlflowClient

    from qvl_pipeline.tracking.mlflow.sinks import MetricsSink, SendToMlflow
    from qvl_pipeline.tracking.mlflow.unsent import send_unsent

    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    path = models / "tiny_qwen3_vl" / "scratch" / run_id / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    sink = MetricsSink("mlflow", run_id, path, SendToMlflow(run_id))
    requests = len(proxy.happened)
    proxy.failing = failing
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, path, str(steps)], stdout=subprocess.PIPE, text=True)
    while engine.poll() is None:
        sink.poll()
        time.sleep(0.2)
    wall_s, cpu_s = json.loads(engine.communicate()[0])
    unsent = sink.close(timeout_s=2)
    proxy.failing = False
    send_unsent(models)
    history = client.get_metric_history(run_id, "train/loss")
    return {
        "server": "fails" if failing else "works",
        "training_s": wall_s,
        "training_cpu_s": cpu_s,
        "failed_requests": len(proxy.happened) - requests,
        "rows_unsent_at_end": unsent,
        "steps_in_mlflow": len({point.step for point in history}),
        "steps_more_than_once": len(history) - len({point.step for point in history}),
    }


def main() -> None:
    """Alternate trainings beside a server that works and one that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
    import mlflow

    with (
        tempfile.TemporaryDirectory() as name,
        mlflow_server(f"sqlite:///{name}/mlflow.db", Path(name)) as port,
        FaultyProxy(port) as proxy,
    ):
        mlflow.set_tracking_uri(proxy.uri)
        models = Path(name) / "models"
        train(models, proxy, 5, failing=True)  # what is imported or made the first time
        rows = []
        for number in range(given.rounds):
            order = (False, True) if number % 2 else (True, False)
            rows += [{"round": number, **train(models, proxy, given.steps, failing=failing)} for failing in order]
    whole = sum(row["steps_in_mlflow"] == given.steps and row["steps_more_than_once"] == 0 for row in rows)
    report(
        "tracking",
        rows,
        ratios={
            "time_beside_a_failing_server": _ratio(rows, "training_s"),
            "cpu_time_beside_a_failing_server": _ratio(rows, "training_cpu_s"),
            "curves_whole": whole / len(rows),
        },
        targets={
            "time_beside_a_failing_server": "<= 1.05",
            "cpu_time_beside_a_failing_server": "<= 1.05",
            "curves_whole": "1",
        },
    )


def _ratio(rows: list[dict[str, Any]], key: str) -> float:
    """Median over the rounds of the time beside the failing server over that beside the working one."""
    times = {(row["round"], row["server"]): row[key] for row in rows}
    return median(times[number, "fails"] / times[number, "works"] for number in {row["round"] for row in rows})


if __name__ == "__main__":
    main()

"""What people see in a browser: MLflow, the comparison, Kedro-Viz. The pictures are in build/screenshots."""

from __future__ import annotations

import functools
import html
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote

import pandas as pd
import pytest

from qvl_pipeline.pipeline_registry import STAGES
from qvl_pipeline.tracking.compare import compare_runs
from qvl_pipeline.tracking.compare_page import render_comparison
from tests.kedro_project import REPOSITORY, make_project
from tests.trainings import Recorder, predictions
from tests.ui.browser import open_page

# The targets of the Makefile with the tools of this Python, whose environment needs no update.
MAKE = ["make", "--no-print-directory", f"--makefile={REPOSITORY}/Makefile", "--assume-old=.venv/.up-to-date"]


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY / "src"), **variables}


def shown(page: str) -> str:
    """Return the text of a page, without its tags."""
    text = re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(text))


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Recorder:
    """Trainings of two profiles."""
    recorder = Recorder(tmp_path_factory.mktemp("mlflow"), empty_database)
    half, most = [True, False] * 20, [True] * 35 + [False] * 5
    recorder.training("base", 2e-3, predictions({"video": half, "text": most}), final_loss=0.3)
    recorder.training("tiny_qwen2_5_vl", 1e-3, predictions({"video": most, "text": most}, answer="8"), final_loss=0.2)
    return recorder


@pytest.fixture(scope="module")
def mlflow_ui(recorder: Recorder) -> Iterator[str]:
    """The address that `make ui` prints, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment(MLFLOW_TRACKING_URI=recorder.uri)
    process = subprocess.Popen(
        [*MAKE, "ui", f"PORT={port}"],
        cwd=recorder.folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        address = process.stdout.readline().decode().split()[1]
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


def _wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(1800):
        assert process.poll() is None, process.stdout.read()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(url)


def test_mlflow_shows_the_runs_of_both_profiles(mlflow_ui: str) -> None:
    text = shown(open_page(mlflow_ui, "mlflow-runs"))
    assert "2 matching runs" in text
    assert "Playground" not in text, "the menu of another kind of work"
    assert " base " in text
    assert " tiny_qwen2_5_vl " in text


def test_mlflow_compares_parameters_and_curves(mlflow_ui: str, recorder: Recorder) -> None:
    runs = quote(json.dumps(recorder.runs()))
    experiments = quote('["1"]')
    site = mlflow_ui.partition("#")[0]
    page = open_page(f"{site}#/compare-runs?runs={runs}&experiments={experiments}", "mlflow-compare", height=1900)
    text = shown(page)
    assert "Comparing 2 Runs from 1 Experiment" in text
    assert re.search(r"train\.learning_rate (0\.001 0\.002|0\.002 0\.001)", text)
    assert "js-plotly-plot" in page
    # Where a click on `train/loss` leads.
    metric, metrics = quote('"train/loss"'), quote('["train/loss"]')
    chosen = f"runs={runs}&metric={metric}&experiments={experiments}&plot_metric_keys={metrics}"
    page = open_page(f"{site}#/metric?{chosen}", "mlflow-curves")
    assert len(re.findall(r'class="trace scatter', page)) >= 2
    assert "base (train/loss)" in shown(page)
    assert "tiny_qwen2_5_vl (train/loss)" in shown(page)


def test_the_comparison_shows_overlaid_curves(recorder: Recorder, tmp_path: Path) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(recorder.uri)
    try:
        (tmp_path / "compare.html").write_text(render_comparison(compare_runs(["base", "tiny_qwen2_5_vl"])))
    finally:
        mlflow.set_tracking_uri(before)
    page = open_page((tmp_path / "compare.html").as_uri(), "compare", height=2600, wait_ms=500)
    training_loss = page.split('aria-label="Training loss by optimizer step"')[1].split("</figure>")[0]
    assert re.findall(r'class="line (run\d) smooth"', training_loss) == ["run0", "run1"]
    text = shown(page)
    assert "train.learning_rate 0.002 0.001" in text
    assert re.search(r"video exact_match base 40 50\.0 %", text)
    assert re.search(r"tiny_qwen2_5_vl 40 87\.5 % 73\.9 % \S 94\.5 % \+37\.5", text)


@pytest.fixture(scope="module")
def viz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address and the folder of the web site that `make viz-static` writes."""
    project = make_project(tmp_path_factory.mktemp("viz") / "project")
    reporting = project / "data" / "08_reporting" / "base"
    reporting.mkdir(parents=True)
    metrics = pd.DataFrame({"step": [5, 10, 15], "loss": [3.0, 1.0, 0.5], "eval_loss": [None, 1.5, None]})
    metrics.to_csv(reporting / "training_metrics.csv", index=False)
    shutil.copy(REPOSITORY / ".telemetry", project)
    subprocess.run([*MAKE, "viz-static"], cwd=project, env=environment(), capture_output=True, check=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=project / "build")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", project / "build"
        server.shutdown()


def test_kedro_viz_shows_the_stages_the_layers_and_a_preview(viz: tuple[str, Path]) -> None:
    address, folder = viz
    nodes = json.loads((folder / "api" / "main").read_text())["nodes"]
    curves = next(node["id"] for node in nodes if node["name"] == "training_metrics")
    page = open_page(f"{address}/?pid=__default__&sid={curves}", "kedro-viz", height=1100)
    options = re.findall(r'class="menu-option__content[^"]*" title="(\w+)"', page)
    assert set(STAGES) <= set(options)
    layers = re.findall(r'class="pipeline-layer-name[^"]*"[^>]*>(\w+)<', page)
    assert layers == ["raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting"]
    assert len(re.findall(r'class="trace scatter', page)) == 2, "loss and eval loss"

"""What people see in a browser: MLflow, the comparison, Kedro-Viz. The pictures are in build/screenshots."""

from __future__ import annotations

import contextlib
import functools
import html
import http.server
import json
import os
import re
import shutil
import signal
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
from qvl_pipeline.ports import free_port
from qvl_pipeline.reports.compare.page import render_comparison
from qvl_pipeline.reports.compare.tables import compare_runs
from qvl_pipeline.reports.evaluation.report import render_report
from qvl_pipeline.reports.evaluation.samples_page import PART, write_samples_page
from qvl_pipeline.reports.validation_page import render_validation
from tests.kedro_project import REPOSITORY, make_project
from tests.reports.evaluation.test_report import prediction, report_facts
from tests.trainings import Recorder, predictions
from tests.ui.browser import open_page

# The targets of the Makefile with the tools of this Python, whose environment needs no update.
MAKE = ["make", "--no-print-directory", f"--makefile={REPOSITORY}/Makefile", "--assume-old=.venv/.up-to-date"]


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Without the variables that `make test` itself was given: they would be those of these commands, too.
    given = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV")
    inherited = {name: value for name, value in os.environ.items() if name not in given}
    return inherited | {"PATH": path, "PYTHONPATH": str(REPOSITORY / "src"), **variables}


def shown(page: str) -> str:
    """Return the text of a page, without its tags."""
    text = re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(text))


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Recorder:
    """Trainings of two profiles."""
    recorder = Recorder(tmp_path_factory.mktemp("mlflow"), empty_database)
    half, most = [True, False] * 20, [True] * 35 + [False] * 5
    recorder.training("tiny_qwen3_vl", 2e-3, predictions({"video": half, "text": most}), final_loss=0.3)
    recorder.training("tiny_qwen2_5_vl", 1e-3, predictions({"video": most, "text": most}, answer="8"), final_loss=0.2)
    for run, score in zip(recorder.runs(), (0.875, 0.6875), strict=True):
        recorder.client.log_metric(run, "eval/overall/exact_match", score)
    return recorder


@pytest.fixture(scope="module")
def mlflow_ui(recorder: Recorder) -> Iterator[str]:
    """The address that `make ui` prints, once it answers."""
    port = free_port()
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
    text = shown(open_page(mlflow_ui, "mlflow-runs", shows="tiny_qwen2_5_vl"))
    assert "2 matching runs" in text
    assert "Playground" not in text, "the menu of another kind of work"
    assert " tiny_qwen3_vl " in text
    assert " tiny_qwen2_5_vl " in text


def test_mlflow_opens_a_table_of_what_matters_and_charts_that_begin_with_the_loss(mlflow_ui: str) -> None:
    table = shown(open_page(mlflow_ui, "mlflow-view", shows="0.875"))
    for column in ("train/loss", "train/eval_loss", "eval/overall/exact_match", "train.learning_rate"):
        assert column in table
    assert "0.875" in table
    assert "train.seed" not in table, "the same in all runs"
    charts = open_page(
        f"{mlflow_ui}&compareRunsMode=CHART", "mlflow-charts", height=2400, shows=">eval/overall/exact_match<"
    )
    order = [charts.index(f">{name}<") for name in ("train/loss", "train/eval_loss", "eval/overall/exact_match")]
    assert order == sorted(order)
    assert len(re.findall(r'class="trace scatter', charts)) >= 4, "two curves of two runs"


def test_mlflow_compares_parameters_and_curves(mlflow_ui: str, recorder: Recorder) -> None:
    runs = quote(json.dumps(recorder.runs()))
    experiments = quote('["1"]')
    site = mlflow_ui.partition("#")[0]
    compared = f"{site}#/compare-runs?runs={runs}&experiments={experiments}"
    page = open_page(compared, "mlflow-compare", height=1900, shows="js-plotly-plot")
    text = shown(page)
    assert "Comparing 2 Runs from 1 Experiment" in text
    assert re.search(r"train\.learning_rate (0\.001 0\.002|0\.002 0\.001)", text)
    assert "js-plotly-plot" in page
    # Where a click on `train/loss` leads.
    metric, metrics = quote('"train/loss"'), quote('["train/loss"]')
    chosen = f"runs={runs}&metric={metric}&experiments={experiments}&plot_metric_keys={metrics}"
    page = open_page(f"{site}#/metric?{chosen}", "mlflow-curves", shows='class="trace scatter')
    assert len(re.findall(r'class="trace scatter', page)) >= 2
    assert "tiny_qwen3_vl (train/loss)" in shown(page)
    assert "tiny_qwen2_5_vl (train/loss)" in shown(page)


@pytest.fixture
def comparison(recorder: Recorder) -> Iterator[str]:
    """The page of `make compare`."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(recorder.uri)
    yield render_comparison(compare_runs(["tiny_qwen3_vl", "tiny_qwen2_5_vl"]))
    mlflow.set_tracking_uri(before)


def test_the_comparison_shows_overlaid_curves(comparison: str, tmp_path: Path) -> None:
    (tmp_path / "compare.html").write_text(comparison)
    page = open_page((tmp_path / "compare.html").as_uri(), "compare", height=2600, wait_ms=500)
    training_loss = page.split('aria-label="Training loss by optimizer step"')[1].split("</figure>")[0]
    assert re.findall(r'class="line (run\d) smooth"', training_loss) == ["run0", "run1"]
    text = shown(page)
    assert "train.learning_rate 0.002 0.001" in text
    assert re.search(r"video exact_match tiny_qwen3_vl 40 50\.0 %", text)
    assert re.search(r"tiny_qwen2_5_vl 40 87\.5 % 73\.9 % \S 94\.5 % \+37\.5", text)


def test_no_page_is_wider_than_the_screen_of_a_phone(comparison: str, tmp_path: Path) -> None:
    facts, source = report_facts(), "a_source_with_a_rather_long_name"
    for model in facts["slices"].values():
        model["source"] = {source: model["source"]["made"]}
    lost = pd.DataFrame([{"source": source, "row": 1, "rule": "unreadable_row", "detail": "x" * 200}])
    pages = {
        "report": render_report(**facts),
        "compare": comparison,
        "validation": render_validation(
            dataset="data",
            report=facts["validation_report"],
            samples=[],
            rejects=lost,
            quarantine=lost.assign(sample_id=f"{source}/2"),
            warnings=lost.assign(sample_id=f"{source}/3"),
            media_index=pd.DataFrame(columns=["type", "width", "height", "duration_s", "fps"]),
            thumbnail=lambda *_: None,
        ),
    }
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page)
    long = facts["predictions"].assign(source=source * 2, trained_answer="x" * 500)
    write_samples_page(tmp_path / "samples", title="a" * 60, predictions=long, media=facts["media"], most=100)
    pages["samples/index"] = ""
    frames = "".join(f'<iframe id="{name}" src="{name}.html" width="360" height="1000"></iframe>' for name in pages)
    script = """onload = () => {
      for (const { id, contentDocument: { documentElement: page } } of document.querySelectorAll("iframe"))
        document.body.append(`${id}: ${page.scrollWidth - page.clientWidth} too wide; `)
    }"""
    (tmp_path / "phones.html").write_text(f"<style>iframe {{ border: 0 }}</style>{frames}<script>{script}</script>")
    with served(tmp_path) as address:
        text = shown(open_page(f"{address}/phones.html", "phones", wait_ms=1000, shows=": 0 too wide; "))
    assert text.strip() == " ".join(f"{name}: 0 too wide;" for name in pages)


def test_the_page_of_samples_filters_and_loads_what_is_seen(tmp_path: Path) -> None:
    facts = report_facts()
    rows = [prediction(number, f"kind {number % 2}", number % 4 < 2) for number in range(20 * PART)]
    write_samples_page(tmp_path / "s", title="tiny", predictions=pd.DataFrame(rows), media=facts["media"], most=1000)
    asked: list[str] = []
    card = '<article class="card"'
    with served(tmp_path, asked) as address:
        page = open_page(f"{address}/s/index.html", "samples", wait_ms=3000, shows=card)
        assert "400 of 400 evaluated samples" in shown(page)
        assert parts_of_last_opening(asked) == ["/s/part-00000.js"], "of twenty"
        filtered = f"{address}/s/index.html#kind=kind+1&answer=right"
        page = open_page(filtered, "samples-filtered", wait_ms=3000, shows=card)
    assert "100 of 400 evaluated samples" in shown(page)
    assert parts_of_last_opening(asked) == ["/s/part-00015.js"], "kinds in order, wrong ones first"
    cards = re.findall(r'<article class="card" title="made/(\d+)"', page)
    assert len(cards) >= 4
    assert {int(number) % 4 for number in cards} == {1}


def parts_of_last_opening(asked: list[str]) -> list[str]:
    """What of the samples was asked for since the page was, which may be opened again until it is drawn."""
    since = len(asked) - asked[::-1].index("/s/index.html")
    return [path for path in asked[since:] if "part" in path]


@contextlib.contextmanager
def served(folder: Path, asked: list[str] | None = None) -> Iterator[str]:
    """The address of a web site of the files in `folder`; what is asked for is added to `asked`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if asked is not None:
                asked.append(self.path)
            super().do_GET()

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def viz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address and the folder of the web site that `make viz-static` writes."""
    project = make_project(tmp_path_factory.mktemp("viz") / "project")
    reporting = project / "data" / "08_reporting" / "tiny_qwen3_vl"
    reporting.mkdir(parents=True)
    metrics = pd.DataFrame({"step": [5, 10, 15], "loss": [3.0, 1.0, 0.5], "eval_loss": [None, 1.5, None]})
    metrics.to_csv(reporting / "training_metrics.csv", index=False)
    shutil.copy(REPOSITORY / ".telemetry", project)
    subprocess.run([*MAKE, "viz-static"], cwd=project, env=environment(), capture_output=True, check=True)
    with served(project / "build") as address:
        yield address, project / "build"


def test_kedro_viz_shows_the_stages_the_layers_and_a_preview(viz: tuple[str, Path]) -> None:
    address, folder = viz
    whole = open_page(
        f"{address}/?pid=__default__", "kedro-viz-stages", height=1100, shows="pipeline-node--modularPipeline"
    )
    boxes = re.findall(r'class="[^"]*pipeline-node--modularPipeline[^"]*"[^>]*data-id="(\w+)"', whole)
    assert sorted(boxes) == sorted(STAGES)
    nodes = json.loads((folder / "api" / "main").read_text())["nodes"]
    curves = next(node["id"] for node in nodes if node["name"] == "training_metrics")
    opened = f"{address}/?pid=__default__&expandAllPipelines=true&sid={curves}"
    page = open_page(opened, "kedro-viz", height=1100, shows='class="trace scatter')
    options = re.findall(r'class="menu-option__content[^"]*" title="(\w+)"', page)
    assert set(STAGES) <= set(options)
    layers = re.findall(r'class="pipeline-layer-name[^"]*"[^>]*>(\w+)<', page)
    assert layers == ["raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting"]
    assert len(re.findall(r'class="trace scatter', page)) == 2, "loss and eval loss"

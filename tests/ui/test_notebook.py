from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.kedro_project import REPOSITORY
from tests.trainings import Recorder, predictions
from tests.ui.browser import open_page

NOTEBOOK = REPOSITORY / "notebooks" / "compare_runs.ipynb"


def outputs(cells: list[dict[str, Any]], kind: str) -> list[str]:
    return ["".join(out["data"][kind]) for cell in cells for out in cell["outputs"] if kind in out.get("data", {})]


def test_the_notebook_shows_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> None:
    recorder = Recorder(tmp_path, empty_database)
    recorder.training("first", 2e-3, predictions({"video": [True, False] * 5}))
    recorder.training("other", 1e-3, predictions({"video": [True] * 10}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorder.uri)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = "\n".join(outputs(cells, "text/plain"))
    assert "train.learning_rate  0.002  0.001" in text
    assert "5 of 10 common samples" in "".join(out.get("text", "") for cell in cells for out in cell["outputs"])
    pages = outputs(cells, "text/html")
    assert len([page for page in pages if 'class="plotly-graph-div"' in page]) == 3
    assert len([page for page in pages if "plotly.js v" in page]) == 1, "Plotly itself, once"
    assert not re.search(r'<(?:script|link)[^>]*(?:src|href)="?https?:|import "https?:', " ".join(pages))
    (tmp_path / "plots.html").write_text("\n".join(pages))
    plots = (tmp_path / "plots.html").as_uri()
    drawn = open_page(plots, "notebook", height=2600, wait_ms=3000, shows='class="trace bars')
    assert len(re.findall(r'class="trace scatter', drawn)) == 4, "two curves of two runs"
    assert len(re.findall(r'class="trace bars', drawn)) == 2
    streams = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "stream"]
    assert "".join(out["text"] for out in streams if out["name"] == "stderr") == "", "progress bars"


def test_the_committed_notebook_has_no_output() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)

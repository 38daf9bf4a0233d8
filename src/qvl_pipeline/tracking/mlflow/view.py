"""What `make ui` opens: MLflow's table of runs with loss, scores and the parameters that vary, and charts in order.

MLflow keeps a view that is shared by address as a tag of the experiment, `mlflow.sharedViewState.<key>`: what its pages
keep as their state. Made anew each time, for other parameters vary once other runs are there.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KEY = "qvl_pipeline"
DATABASE = "sqlite:///mlflow.db"
# Columns; more would be wider than a screen.
LOSSES, SCORES = ("train/loss", "train/eval_loss"), "eval/overall/"
MOST_PARAMETERS, MOST_SCORES, NEWEST = 8, 30, 200
# Blocks whose parameters make a model, in the order in which they are shown.
BLOCKS = ("train", "adapter", "model", "sample", "batching")
CURVES = (*LOSSES, "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/data_wait_share")


def view_state(runs: Sequence[tuple[dict[str, str], dict[str, float]]]) -> dict[str, Any]:
    """Make the state of MLflow's page.

    Args:
        runs: Parameters and metrics of each run.

    Returns:
        Columns of the table, and charts: curves of the training first, then the scores.
    """
    metrics = sorted({name for _, found in runs for name in found})
    scores = [name for name in metrics if name.startswith(SCORES) and not name.endswith("/n")]
    columns = [*(name for name in LOSSES if name in metrics), *scores]
    others = [name for name in metrics if name.startswith("eval/") and not name.endswith("/n") and name not in scores]
    sections = {
        "Training": [_chart("LINE", name, "Training") for name in CURVES if name in metrics],
        "Scores": [_chart("BAR", name, "Scores") for name in [*scores, *others][:MOST_SCORES]],
    }
    return {
        "selectedColumns": [
            "attributes.`Created`",
            *(f"metrics.`{name}`" for name in columns),
            *(f"params.`{name}`" for name in varying(parameters for parameters, _ in runs)),
        ],
        "compareRunSections": [
            {"uuid": _uuid(name), "name": name, "display": True, "isReordered": False} for name in sections
        ],
        "isAccordionReordered": True,  # or sections are sorted by their names
        "compareRunCharts": [chart for charts in sections.values() for chart in charts],
    }


def varying(runs: Iterable[dict[str, str]]) -> list[str]:
    """Return the parameters of models that do not have one value in all runs, as many as there is room for."""
    values: dict[str, set[str]] = {}
    for parameters in runs:
        for name, value in parameters.items():
            values.setdefault(name, set()).add(value)
    several = [name for name, found in values.items() if len(found) > 1 and name.partition(".")[0] in BLOCKS]
    return sorted(several, key=lambda name: (BLOCKS.index(name.partition(".")[0]), name))[:MOST_PARAMETERS]


def save_view(tracking_uri: str) -> str:
    """Keep the view of the experiment with the newest run in MLflow, and return the path of its page."""
    from mlflow import MlflowClient

    if tracking_uri.startswith("sqlite:///") and not Path(tracking_uri.removeprefix("sqlite:///")).is_file():
        return _path("1")
    client = MlflowClient(tracking_uri)
    experiments, newest_first = [found.experiment_id for found in client.search_experiments()], ["start_time DESC"]
    newest = client.search_runs(experiments, order_by=newest_first, max_results=1)
    if not newest:
        return _path("1")
    experiment = newest[0].info.experiment_id
    runs = client.search_runs([experiment], order_by=newest_first, max_results=NEWEST)
    state = view_state([(run.data.params, run.data.metrics) for run in runs])
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{KEY}", packed(state))
    return f"{_path(experiment)}&viewStateShareKey={KEY}"


def packed(state: dict[str, Any]) -> str:
    """Write the state as MLflow's own button does: databases keep 5,000 characters of a tag."""
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode("ascii")


def _path(experiment_id: str) -> str:
    # Without the workflow in the address, MLflow shows its menu for applications of language models.
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def _chart(kind: str, metric: str, section: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": _uuid(metric),
        "metricSectionId": _uuid(section),
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "displayName": metric,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
        **({"xAxisKey": "step", "yAxisKey": "metric", "useGlobalXaxisKey": True} if kind == "LINE" else {}),
    }


def _uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def main() -> None:
    """Print the address that `make ui` serves."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("port", type=int)
    port = parser.parse_args().port
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = save_view(os.environ.get("MLFLOW_TRACKING_URI") or DATABASE)
    print(f"==> http://127.0.0.1:{port}/{path} (Ctrl-C ends it)", flush=True)


if __name__ == "__main__":
    main()

"""Nodes of the pipeline `compare`."""

from __future__ import annotations

import logging

from qvl_pipeline.config import CompareConfig

logger = logging.getLogger(__name__)


def write_comparison(compare: CompareConfig) -> str:
    """Compare trainings that MLflow has, and write the page.

    Args:
        compare: Parameters of the pipeline.

    Returns:
        HTML.

    Raises:
        UserError: A name means no training, or these are not two to eight trainings; or MLflow's server is down.
    """
    from qvl_pipeline.reports.compare.page import render_comparison
    from qvl_pipeline.reports.compare.tables import compare_runs
    from qvl_pipeline.tracking.mlflow.server import answering

    with answering():
        comparison = compare_runs(compare.runs)
    for name, run in comparison.runs.iterrows():
        logger.info("%s is MLflow run %s", name, run["run_id"])
    return render_comparison(comparison)

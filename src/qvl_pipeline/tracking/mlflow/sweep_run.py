"""The run of a sweep in MLflow: what was varied, the best of it, and the runs of the trials below it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow

from qvl_pipeline.tracking.mlflow.chain import CHAIN
from qvl_pipeline.tracking.mlflow.run import MlflowRun, going_on, start_run


class SweepRun:
    """A run that stands above those of its trials."""

    def __init__(self, settings: Mapping[str, Any], name: str, sweep: dict[str, Any], known: str | None) -> None:
        """Begin it, or go on with it.

        Args:
            settings: `mlflow.yml`.
            name: Name of the run.
            sweep: The file of the sweep.
            known: Id of the run, when the sweep goes on.

        Raises:
            UserError: The tracking server or database cannot be used.
        """
        place = settings["tracking_uri"], settings["experiment"], settings["artifact_location"]
        self._run = start_run(*place, name) if known is None else MlflowRun(known)
        if known is None:
            with going_on("the parameters of this sweep"):
                self._run.set_tags({CHAIN: "sweep", "profile": sweep["env"]})
                self._run.log_yaml(sweep, "sweep.yml")
        else:
            from qvl_pipeline.tracking.mlflow.server import use_server

            use_server(settings["tracking_uri"])
        self.id = self._run.id

    def finish(self, status: str, page: Path | None, best: Mapping[str, Any]) -> None:
        """End it.

        Args:
            status: `FINISHED` or `KILLED`.
            page: The page of the sweep.
            best: The best figure, and the values of the parameters that it was reached with.
        """
        with going_on("the best of this sweep"):
            self._run.log_metrics(
                {"best": {key: value for key, value in best.items() if isinstance(value, int | float)}}
            )
            if best:
                self._run.set_tags({"best": json.dumps(dict(best))})
            if page is not None:
                self._run.log_artifact(page)
        self._run.finish(status)
        if mlflow.active_run():
            mlflow.end_run(status)

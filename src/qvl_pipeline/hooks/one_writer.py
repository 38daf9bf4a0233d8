"""One run at a time writes what a stage makes."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline.node import Node

from qvl_pipeline.errors import UserError
from qvl_pipeline.locks import turn
from qvl_pipeline.pipeline_registry import STAGES

logger = logging.getLogger(__name__)

# An entry of every stage; while one is in the folder of its entry, no other run is.
PLACES = {
    "ingest": "samples",
    "validate": "valid_samples",
    "sample": "video_frames",
    "tokenize": "tokenized_samples",
    "train": "trained_model",
    "evaluate": "predictions",
}


class OneWriter:
    """Lets one run at a time write what a stage makes: of a dataset, or of a profile.

    A second run waits for the data stages, which take it minutes to do again; hours of training it does not.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._stage, self._turn = "", contextlib.ExitStack()

    @hook_impl
    def after_catalog_created(self, conf_catalog: dict[str, Any]) -> None:
        """Remember where the stages write."""
        self._places = {
            stage: Path(conf_catalog[name]["filepath"]).parent for stage, name in PLACES.items() if name in conf_catalog
        }

    @hook_impl
    def before_node_run(self, node: Node, catalog: DataCatalog) -> None:
        """Take the turn of the node's stage, and leave that of the stage before.

        Raises:
            UserError: Another run trains or evaluates the same profile.
        """
        stage = next((stage for stage in STAGES if node in pipelines[stage].nodes), "")
        if stage == self._stage:
            return
        self._leave()
        if stage == "train" and catalog.load("params:train").launch.nodes().node_rank > 0:
            return  # it joins the run that has the turn
        if stage in self._places:
            place = self._places[stage]
            self._turn.enter_context(turn(place, lambda: _wait_for_another(stage, place)))
        self._stage = stage

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Leave the turn."""
        self._leave()

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Leave the turn."""
        self._leave()

    def _leave(self) -> None:
        self._stage = ""
        self._turn.close()


def _wait_for_another(stage: str, place: Path) -> None:
    if stage in ("train", "evaluate"):
        raise UserError(
            f"another run is at the stage '{stage}', whose results are in {place} too: wait for it or end it, then run "
            "the same command again; trainings that are to run side by side need a profile each"
        )
    logger.info("%s: waiting for another run, which makes the same in %s", stage, place)

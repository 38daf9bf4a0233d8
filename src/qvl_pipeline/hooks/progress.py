"""A line for every node of a run."""

from __future__ import annotations

import logging
import time

from kedro.framework.hooks import hook_impl
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

logger = logging.getLogger(__name__)


class Progress:
    """Says which node of how many starts, and how long all of them took."""

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Number the nodes."""
        self._names = [node.name for node in pipeline.nodes]
        self._started = time.perf_counter()

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Say what starts."""
        logger.info("[%d/%d] %s", self._names.index(node.name) + 1, len(self._names), node.name)

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Say that all is done."""
        logger.info("done in %.0f s", time.perf_counter() - self._started)

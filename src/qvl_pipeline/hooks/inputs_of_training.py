"""No run writes what another one is training on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from qvl_pipeline.training.in_use import READ_WHILE_TRAINING, InUse


class InputsOfTraining:
    """Keeps a run from writing what another one is training on, and from reading what another one is writing."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._held: InUse | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Remember the profile."""
        self._profile = context.config_loader.profile.name

    @hook_impl
    def after_catalog_created(self, conf_catalog: dict[str, Any]) -> None:
        """Remember where the entries are."""
        entry = conf_catalog.get("tokenized_samples") or {}
        self._folder = Path(entry["filepath"]).parent if "filepath" in entry else None

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Take hold of what the run reads; where it first writes it, see that it will be able to.

        Raises:
            UserError: Another run is in the way.
        """
        self._let_go()  # of a run before this one in a notebook, which was interrupted
        self._unwritten = pipeline.all_outputs() & READ_WHILE_TRAINING
        if self._folder is None or not pipeline.datasets() & READ_WHILE_TRAINING:
            return
        self._held = InUse(self._folder, self._profile)
        self._held.check_that_nobody_reads() if self._unwritten else self._held.read()

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Be the only one, from the first node that writes.

        Raises:
            UserError: Another run has begun to read meanwhile.
        """
        if self._held is not None and self._unwritten & set(node.outputs):
            self._held.write()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str) -> None:
        """Let others read when all is written, and go on as one of them."""
        if self._held is not None and dataset_name in self._unwritten:
            self._unwritten -= {dataset_name}
            if not self._unwritten:
                self._held.read()

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Let go."""
        self._let_go()

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Let go."""
        self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.end()

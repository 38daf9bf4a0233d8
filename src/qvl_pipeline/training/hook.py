"""When a training's scratch folder is no longer needed: Kedro saves the results, and only then is anything deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.pipeline import Pipeline

from qvl_pipeline.training.scratch import leave, let_go, note_published

BASE_MODEL, RESULT_ENTRY = "base_model", "train_result"


class PublicationHook:
    """Deletes checkpoints once model and result are saved, and the export once the whole command is done.

    Until then the same command, run again, publishes what was trained, also where the evaluation was cut off.
    """

    @hook_impl
    def after_catalog_created(self, conf_catalog: dict[str, Any]) -> None:
        """Remember where trainings work."""
        self._scratch = Path(conf_catalog.get(BASE_MODEL, {}).get("filepath", "")).parent / "scratch"

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Note that a training was published: its result is the last of its outputs."""
        if dataset_name == RESULT_ENTRY and "training" in data:
            note_published(self._scratch / data["training"])

    @hook_impl(trylast=True)
    def after_pipeline_run(self, pipeline: Pipeline) -> None:
        """Leave the folders of trainings that this command published, or evaluated."""
        let_go()
        if RESULT_ENTRY in pipeline.inputs() | pipeline.all_outputs():
            leave(self._scratch)

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Let go of the folder: another process may try."""
        let_go()

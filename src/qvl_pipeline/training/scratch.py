"""The folder a training works in, `scratch/<fingerprint>`: held by one run at a time, and left when published."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from qvl_pipeline.tracking.mlflow.unsent import keep_unsent, only_sender

PACK_PLAN = "pack_plan.parquet"
EVAL_PLAN = "eval_plan.parquet"
SPEC = "train_spec.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
EXPORT = "export"
CHECKPOINTS = "checkpoints"
PUBLISHED = "PUBLISHED"


@contextlib.contextmanager
def held(folder: Path, *, resume: bool) -> Iterator[None]:
    """Hold the folder; a published run, or one that must not be resumed, starts afresh in it.

    Raises:
        UserError: Another process trains there. Nothing of it was touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with only_sender(folder):
        _make_ready(folder, resume=resume)
        yield


def starts_afresh(folder: Path, *, resume: bool) -> bool:
    """Whether what is in the folder is of no use to a training: it was published, or must not be resumed."""
    return not resume or (folder / PUBLISHED).exists()


def _make_ready(folder: Path, *, resume: bool) -> None:
    from qvl_pipeline.engine.run.checkpoint_files import newest_sound
    from qvl_pipeline.engine.run.metrics import keep_rows_until
    from qvl_pipeline.engine.run.stopping import STOPPED

    keep_unsent(folder)
    if starts_afresh(folder, resume=resume):
        for left_behind in folder.iterdir():  # not the folder itself, which is held
            if left_behind.is_dir():
                shutil.rmtree(left_behind, ignore_errors=True)
            elif not left_behind.match("engine.node*.log"):  # of nodes that may have joined already
                left_behind.unlink()
    shutil.rmtree(folder / "errors", ignore_errors=True)
    (folder / STOPPED).unlink(missing_ok=True)
    done, wrong = newest_sound(folder / CHECKPOINTS)
    for damage in wrong:
        print(f"train: a checkpoint is set aside, because {damage}", flush=True)
    if done:
        print(f"train: continuing after step {done}, the newest checkpoint of this very run", flush=True)
    # Here and not only in the engine: trackers must not see rows that are about to be written again.
    keep_rows_until(folder / METRICS, done)


def publish(folder: Path, destination: Path) -> None:
    """Copy the export to its place, then drop what only an unfinished training needs: it is several times the model."""
    shutil.copytree(folder / EXPORT, destination)
    (folder / PUBLISHED).touch()
    shutil.rmtree(folder / EXPORT)
    shutil.rmtree(folder / CHECKPOINTS)

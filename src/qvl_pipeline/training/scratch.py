"""The folder a training works in, `scratch/<fingerprint>`: held by one run at a time, and left when published.

What is in it says how far the training is. Each step is one rename or one new file, and what the next run of the same
command does depends on nothing else, so it may be cut off anywhere:

| there is | then |
|---|---|
| no `result.json` | it trains, from the newest checkpoint on |
| `result.json` and `export/` | it is finished: nothing is trained again, the export is (again) put into its place |
| … and `PUBLISHED` | all results are in their places; checkpoints go, the export stays until the command is done |
| `PUBLISHED`, no `export/` | the command is done, and the next one trains afresh |
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qvl_pipeline.errors import UserError
from qvl_pipeline.locks import lock, relock
from qvl_pipeline.storage.digests import DIGESTS, add_digest, read_sealed, sealed
from qvl_pipeline.tracking.lineage.dvc_cache import link_file
from qvl_pipeline.tracking.mlflow.unsent import keep_unsent, only_sender

PACK_PLAN = "pack_plan.parquet"
EVAL_PLAN = "eval_plan.parquet"
SPEC = "train_spec.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
EXPORT = "export"
KEPT = "kept"
CARD = "README.md"
# What decided the training, block by block; beside the model's weights, so that it goes where they go.
PARAMETERS = "training_parameters.json"
CHECKPOINTS = "checkpoints"
PUBLISHED = "PUBLISHED"
# In the folder of models of chosen steps: why each is there.
CHECKPOINTS_LIST = "checkpoints.json"

# Processes of a run that was killed are about to end: a GPU may take its time to let them go.
PATIENCE_S = 30.0

logger = logging.getLogger(__name__)
_held: list[int] = []


@contextlib.contextmanager
def held(folder: Path, *, resume: bool) -> Iterator[None]:
    """Hold the folder, made ready; without an error it stays held until `let_go`, which is after it was published.

    The lock is shared with the ranks, which take it themselves: as long as one of them lives, no other run begins.

    Raises:
        UserError: Another process trains there. Nothing of it was touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    let_go()
    handle = _alone(folder)
    try:
        _make_ready(folder, resume=resume)
        if handle is not None:
            relock(handle, shared=True)
        yield
    except BaseException:
        if handle is not None:
            os.close(handle)
        raise
    if handle is not None:
        _held.append(handle)


def let_go() -> None:
    """Let go of what this process holds."""
    while _held:
        os.close(_held.pop())


def _alone(folder: Path) -> int | None:
    deadline = time.monotonic() + PATIENCE_S
    waits = False
    while True:
        try:
            return lock(folder)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder} is in use: another process trains there, or sends its metrics. Wait for it, or end it, "
                    "then run the same command again"
                ) from error
        if not waits:
            print(f"train: waiting for another process to leave {folder}", flush=True)
        waits = True
        time.sleep(0.2)


def is_finished(folder: Path) -> bool:
    """Whether a training was done to the end there, and has but to be published."""
    return (folder / RESULT).exists() and (folder / EXPORT).exists()


def starts_afresh(folder: Path, *, resume: bool) -> bool:
    """Whether what is in the folder is of no use to a training: it was published, or must not be resumed."""
    return not resume or ((folder / PUBLISHED).exists() and not (folder / EXPORT).exists())


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
    if is_finished(folder):
        print("train: trained to the end before, but the command was cut off: nothing is trained again", flush=True)
        return
    for outdated in (RESULT, PUBLISHED):  # of an export that someone took away
        (folder / outdated).unlink(missing_ok=True)
    done, wrong = newest_sound(folder / CHECKPOINTS)
    for damage in wrong:
        print(f"train: a checkpoint is set aside, because {damage}", flush=True)
    if done:
        print(f"train: continuing after step {done}, the newest checkpoint of this very run", flush=True)
    # Here and not only in the engine: trackers must not see rows that are about to be written again.
    keep_rows_until(folder / METRICS, done)


def publish(folder: Path, papers: Mapping[str, str], destination: Path) -> None:
    """Copy the export to its place; nothing is deleted before all results are in theirs.

    Args:
        folder: The training's scratch folder.
        papers: Texts that go with it, by the names of their files: `CARD` and `PARAMETERS`.
        destination: Folder to make.
    """
    shutil.copytree(folder / EXPORT, destination)
    _add(papers, destination)


def publish_kept(folder: Path, papers: Mapping[str, str], kept: Mapping[str, Sequence[str]], destination: Path) -> None:
    """Put the models of chosen steps into their place; files that two of them have in common are one file on disk.

    Args:
        folder: The training's scratch folder.
        papers: Texts that go with each, as in `publish`.
        kept: Why each is kept, by its name, such as `step-300`.
        destination: Folder to make: one folder a step, and `checkpoints.json`.
    """
    destination.mkdir(parents=True)
    known: dict[tuple[str, str], Path] = {}
    for name in kept:
        source = folder / KEPT / name
        for file, digest in sorted(read_sealed(source / DIGESTS)["files"].items()):
            link_file(known.setdefault((file, digest), source / file), destination / name / file)
        shutil.copy(source / DIGESTS, destination / name)
        _add(papers, destination / name)
    text = json.dumps(sealed({"kept": {name: list(reasons) for name, reasons in kept.items()}}), indent=2)
    (destination / CHECKPOINTS_LIST).write_text(f"{text}\n", encoding="utf-8")


def _add(papers: Mapping[str, str], destination: Path) -> None:
    for name, text in papers.items():
        (destination / name).unlink(missing_ok=True)  # a link to that of the base model would be written through
        (destination / name).write_text(text, encoding="utf-8")
        add_digest(destination, name)


def note_published(folder: Path) -> None:
    """Say that model and results are in their places, and delete what only training needs: several times the model."""
    (folder / PUBLISHED).touch()
    _delete(folder / CHECKPOINTS)


def leave(scratch: Path) -> None:
    """Delete the exports of all published trainings below `scratch`: the command that made them is done.

    Those that another run holds are left to it.
    """
    let_go()
    for marker in sorted(scratch.glob(f"*/{PUBLISHED}")):
        folder = marker.parent
        with contextlib.suppress(UserError), only_sender(folder):
            removed = folder / f".{EXPORT}.removed"
            _delete(removed)
            with contextlib.suppress(FileNotFoundError):
                (folder / EXPORT).rename(removed)  # at once: half an export would pass for a whole one
            _delete(removed)
            _delete(folder / KEPT)
            _delete(folder / CHECKPOINTS)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s is no longer needed, but cannot be deleted: remove it by hand (%s)", folder, error)

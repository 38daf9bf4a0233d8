"""`python -m qvl_pipeline.engine <train_spec.json>`, started by torchrun on every rank."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from qvl_pipeline.engine.run.checkpoint_files import CheckpointError
from qvl_pipeline.engine.run.stopping import StopRequest
from qvl_pipeline.engine.run.watchdog import StepTimeoutError, Watchdog
from qvl_pipeline.engine.signals import end_loaders, ignore_stop_signals
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer
from qvl_pipeline.orphans import start_rank
from qvl_pipeline.storage.digests import DamagedError
from qvl_pipeline.storage.room import NoRoomError, is_full, no_room

# What a person can mend who knows which file it is; where in the code it was found says nothing more.
MENDABLE = (CheckpointError, DamagedError, NoRoomError)


def main(spec_path: Path) -> int:
    """Train as the spec says.

    A rank that fails leaves `errors/rank<r>.json` and exits at once, so that torchrun ends the others: they would wait
    for it in their next collective until the timeout.

    Returns:
        The exit status; 0 also for a run that stopped on request.
    """
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    stop = StopRequest()
    spec = TrainSpec.load(spec_path)
    errors = Path(spec.run.output_dir) / "errors"
    _set_aside(errors, rank)
    trainer: Trainer | None = None

    def end_hanging(error: StepTimeoutError, where: str) -> None:
        _write_error(errors, rank, trainer, error, where)
        end_loaders()
        os._exit(1)

    try:
        trainer = Trainer(spec, stop, Watchdog(spec.run.ddp_timeout, end_hanging))
        trainer.run()
    except Exception as error:
        where, output_dir = traceback.format_exc(), Path(spec.run.output_dir)
        if is_full(error) and not isinstance(error, MENDABLE):
            error = NoRoomError(no_room(Path(getattr(error, "filename", None) or output_dir), None, error))
        _write_error(errors, rank, trainer, error, where)
        return 1
    dist.destroy_process_group()
    return 0


def _set_aside(folder: Path, rank: int) -> None:
    """Keep this rank's error of the attempt before: what torchrun restarted is not why the run fails, if it does."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    report = folder / f"rank{rank}.json"
    if attempt and report.exists():
        earlier = folder / f"attempt{attempt - 1}"
        earlier.mkdir(exist_ok=True)
        report.rename(earlier / report.name)


def _write_error(folder: Path, rank: int, trainer: Trainer | None, error: Exception, where: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        # An error that all ranks find together says itself where it comes from.
        "rank": getattr(error, "rank", rank),
        "step": getattr(error, "step", getattr(trainer, "step", 0)),
        "sample_ids": getattr(error, "sample_ids", getattr(trainer, "sample_ids", [])),
        "type": type(error).__name__,
        "mendable": isinstance(error, MENDABLE),
        "message": str(error),
        "time": time.time(),
        "traceback": where,
    }
    partial = folder / f".rank{rank}.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / f"rank{rank}.json")


if __name__ == "__main__":
    with start_rank(Path(sys.argv[1]).parent):
        status = main(Path(sys.argv[1]))
    # Whoever asks a rank to stop repeats it until the rank is gone, and Python no longer listens while it shuts down.
    ignore_stop_signals()
    end_loaders()
    if status:
        # Python's own shutdown would wait for the process group's threads.
        sys.stderr.flush()
        os._exit(status)

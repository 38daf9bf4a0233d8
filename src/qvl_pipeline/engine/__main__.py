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

from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.engine.trainer import Trainer


def main(spec_path: Path) -> int:
    """Train as the spec says.

    A rank that fails leaves `errors/rank<r>.json` and exits at once, so that torchrun ends the others: they would wait
    for it in their next collective until the timeout.

    Returns:
        The exit status.
    """
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    spec = TrainSpec.load(spec_path)
    trainer = None
    try:
        trainer = Trainer(spec)
        trainer.run()
    except Exception as error:
        _write_error(Path(spec.run.output_dir) / "errors", rank, trainer, error)
        return 1
    dist.destroy_process_group()
    return 0


def _write_error(folder: Path, rank: int, trainer: Trainer | None, error: Exception) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        # An error that all ranks find together says itself where it comes from.
        "rank": getattr(error, "rank", rank),
        "step": getattr(error, "step", getattr(trainer, "step", 0)),
        "sample_ids": getattr(error, "sample_ids", getattr(trainer, "sample_ids", [])),
        "type": type(error).__name__,
        "message": str(error),
        "time": time.time(),
        "traceback": traceback.format_exc(),
    }
    partial = folder / f".rank{rank}.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(folder / f"rank{rank}.json")


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    if status:
        # Python's own shutdown would wait for the process group's threads.
        sys.stderr.flush()
        os._exit(status)

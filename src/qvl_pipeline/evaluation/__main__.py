"""`python -m qvl_pipeline.evaluation <answering.json>`, started by torchrun on every rank.

The ranks share nothing but the list of rows, so they need no process group: each writes `rank<r>.json` when it is done,
and one byte to `rank<r>.done` for every answer and every loss.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from qvl_pipeline.evaluation.answering import Answering, answer_share
from qvl_pipeline.orphans import start_rank
from qvl_pipeline.storage.whole import write_whole


def main(path: Path) -> int:
    """Answer this rank's share; a failure leaves `errors/rank<r>.json`, as in training. Returns the exit status."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    folder = path.parent
    try:
        with (folder / f"rank{rank}.done").open("wb", buffering=0) as done:
            found = answer_share(Answering.load(path), rank, world_size, lambda n: done.write(b"." * n))
    except Exception as error:
        report = {"rank": rank, "step": 0, "sample_ids": [], "type": type(error).__name__, "message": str(error)}
        report |= {"time": time.time(), "traceback": traceback.format_exc()}
        (folder / "errors").mkdir(exist_ok=True)
        (folder / "errors" / f"rank{rank}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return 1
    write_whole(folder / f"rank{rank}.json", json.dumps(found))
    return 0


if __name__ == "__main__":
    with start_rank(Path(sys.argv[1]).parent):
        sys.exit(main(Path(sys.argv[1])))

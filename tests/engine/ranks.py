"""Ranks of a job as processes that are forked with everything imported: a job starts in a tenth of a second.

`torchrun` imports torch and transformers anew in every rank, which takes longer than what most tests let them do. What
a test wants to know about torchrun itself (rendezvous, signals, restarts) is in `tests.pipelines.test_train_launch`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from qvl_pipeline.ports import free_port

# Whether there is a GPU is asked of NVML: of CUDA itself, the answer would spoil it for the ranks, which are forked.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    [
        "qvl_pipeline.engine.__main__",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen3_5.modeling_qwen3_5",
        "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
        "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
        __name__,
    ]
)


class JobFailedError(AssertionError):
    """A rank failed or the job did not end; the message has the output of all ranks."""


def run_ranks(function: Callable[..., Any], nproc: int, *args: Any, log_dir: Path, timeout_s: float = 120) -> None:
    """Run `function(*args)` on `nproc` ranks that see torchrun's environment variables; all must succeed.

    Args:
        function: Importable function; a rank fails when it raises or returns a non-zero status.
        nproc: Ranks.
        args: Its arguments, the same on all ranks; they are pickled.
        log_dir: Folder for the output of each rank.
        timeout_s: Time after which the job counts as hanging.

    Raises:
        JobFailedError: A rank failed (the others are then ended, as torchrun does), or time was up.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [
        _FORKSERVER.Process(target=_rank, args=(function, args, rank, nproc, port, str(log_dir)))
        for rank in range(nproc)
    ]
    for process in ranks:
        process.start()
    reason = _wait(ranks, time.monotonic() + timeout_s)
    for process in ranks:
        process.kill()
        process.join()
    if reason:
        # A trainer says in `errors/` why it fails, and nothing in its output.
        files = sorted([*log_dir.glob("rank*.log"), *log_dir.parent.rglob("errors/rank*.json")])
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in files)
        raise JobFailedError(f"{reason}\n{logs}")


def _wait(ranks: list[BaseProcess], deadline: float) -> str | None:
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in ranks]
        if any(codes):  # neither None nor 0
            return f"exit codes of the ranks: {codes}"
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.02)
    return f"the job did not end in time; exit codes: {[process.exitcode for process in ranks]}"


def _rank(function: Callable[..., Any], args: tuple[Any, ...], rank: int, nproc: int, port: int, log_dir: str) -> None:
    log = os.open(Path(log_dir) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TOKENIZERS_PARALLELISM="false",
    )
    if rank:
        sys.settrace(None)  # by which coverage is measured, at a third more time: rank 0 runs the same lines
    import torch

    torch.set_num_threads(1)
    try:
        status = function(*args) or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # Python's own shutdown would wait for the process group's threads

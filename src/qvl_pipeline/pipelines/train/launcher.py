"""Starting torchrun, and seeing that it ends: on success, on a failed rank, on Ctrl-C, SIGTERM and SIGKILL."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvl_pipeline.errors import UserError

_POLL_S = 0.2
# torchrun itself gives its ranks 30 s to end.
_GRACE_S = 40.0


class RankFailedError(UserError):
    """A training process failed; the message is one readable block with the first failed rank's error."""


def launch(spec_path: Path, output_dir: Path, nproc_per_node: int, on_poll: Callable[[], None]) -> None:
    """Run the engine under torchrun until it ends.

    The processes form a process group of their own, which is ended with this function however it is left (Ctrl-C and
    SIGTERM arrive as exceptions), so that no GPU stays busy behind a run that is gone.

    Args:
        spec_path: The `train_spec.json`.
        output_dir: Folder of `errors/`; the engine's own output goes to `engine.log` there.
        nproc_per_node: Processes to start.
        on_poll: Called a few times a second, and once after the end.

    Raises:
        RankFailedError: A process failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc_per_node}"]
    command += ["-m", "qvl_pipeline.engine", str(spec_path)]
    log_path = output_dir / "engine.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(nproc_per_node),
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        while process.poll() is None:
            on_poll()
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
    finally:
        _end_group(process)
    on_poll()
    if process.returncode:
        raise RankFailedError(_describe_failure(output_dir, log_path, process.returncode))


def _environment(nproc_per_node: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc_per_node)
    defaults = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads), "NCCL_BLOCKING_WAIT": "0"}
    return {**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}


def _end_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, even by SIGKILL: torchrun then ends its ranks."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        while _signal_group(process, number) and time.monotonic() < deadline:
            time.sleep(0.05)
            number = 0  # only look whether someone is left
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to the group; say whether it has any process left."""
    process.poll()  # a zombie still counts as a member of its group
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _describe_failure(output_dir: Path, log_path: Path, returncode: int) -> str:
    """One block: the rank that failed first, where it was, and the last frames of its traceback."""
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text()) for path in (output_dir / "errors").glob("rank*.json")
    ]
    if not reports:
        if killed := re.search(r"exitcode: -(\d+)\) local_rank: (\d+)", log_path.read_text(errors="replace")):
            name = signal.Signals(int(killed[1])).name
            likely = ": most likely the machine ran out of memory" if name == "SIGKILL" else ""
            return f"training ended because rank {killed[2]} of this node was killed by {name}{likely}; log: {log_path}"
        # What torchrun appends about the failed process says less than the process itself did.
        lines = itertools.takewhile(lambda line: "torch/distributed/elastic" not in line, _lines(log_path))
        tail = "\n".join(f"    {line}" for line in list(lines)[-15:])
        return f"training ended with status {returncode} and no error report; the end of {log_path}:\n{tail}"
    first = min(reports, key=lambda report: report["time"])
    samples = ", ".join(first["sample_ids"][:5]) + (", …" if len(first["sample_ids"]) > 5 else "")
    frames = "\n".join(f"    {line}" for line in first["traceback"].rstrip().splitlines()[-8:])
    return (
        f"training failed on rank {first['rank']} at step {first['step']}: {first['type']}: {first['message']}\n"
        f"  samples in that micro-batch: {samples or 'none yet'}\n"
        f"  where:\n{frames}\n"
        f"  full log: {log_path}"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()

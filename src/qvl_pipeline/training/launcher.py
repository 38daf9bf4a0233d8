"""Starting torchrun, and seeing that it ends: on success, on a failed rank, on Ctrl-C, SIGTERM and SIGKILL."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from qvl_pipeline.config.training.launch import THIS_NODE, Nodes
from qvl_pipeline.engine.run.stopping import STOPPED
from qvl_pipeline.engine.signals import STOP_SIGNALS
from qvl_pipeline.errors import UserError
from qvl_pipeline.orphans import LAUNCHER, end_with_parent
from qvl_pipeline.storage.room import free_bytes, size_text

_POLL_S = 0.2
# Longest that a killed process may take to be gone: a GPU lets it go late.
_GONE_S = 60.0


class RankFailedError(UserError):
    """A process failed; the message is one readable block with the first failed rank's error."""


class StoppedOnRequest(SystemExit):
    """A signal asked to stop, and training did, with a checkpoint: the same command continues it.

    No error, and not the end of the pipeline either: it passes through Kedro to the exit of the process. The status is
    that of `EX_TEMPFAIL` in sysexits.h, "try again later", by which a batch script knows that it may requeue its job.
    """

    status = 75

    def __init__(self, step: int) -> None:
        """Say after which step."""
        print(f"train: stopped on request after step {step}; run the same command to go on from there", flush=True)
        super().__init__(self.status)


@dataclass(frozen=True)
class Processes:
    """What torchrun starts.

    Attributes:
        per_node: Processes of this node.
        nodes: The nodes of the job, and which of them this is.
        max_restarts: How often all processes are started again after one failed.
    """

    per_node: int
    nodes: Nodes = THIS_NODE
    max_restarts: int = 0

    def torchrun(self, job: str) -> list[str]:
        """Return torchrun's command line, up to what it runs.

        Several nodes meet at a store that node 0 hosts, whatever its endpoint is called: names seen from inside a
        container often do not tell which host they mean.

        Args:
            job: Name that all nodes of the job have in common, and no other job.
        """
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={self.per_node}"]
        command += [f"--max-restarts={self.max_restarts}", "--signals-to-handle=SIGHUP"]
        if self.nodes.nnodes == 1:
            return [*command, "--standalone"]
        hosts = "true" if self.nodes.node_rank == 0 else "false"
        command += [f"--nnodes={self.nodes.nnodes}", f"--node-rank={self.nodes.node_rank}", "--rdzv-backend=c10d"]
        return [*command, f"--rdzv-endpoint={self.nodes.endpoint}", f"--rdzv-id={job}", f"--rdzv-conf=is_host={hosts}"]


def launch(
    spec_path: Path,
    processes: Processes,
    on_poll: Callable[[], None],
    module: str = "qvl_pipeline.engine",
    what: str = "training",
) -> None:
    """Run a module under torchrun until it ends.

    All processes are ended with this function however it is left, so that no GPU stays busy behind a run that is gone.
    Asked to stop (Ctrl-C, SIGTERM, SIGUSR1), the ranks finish their step and save first; asked a second time, they are
    ended at once.

    Args:
        spec_path: What the module gets as its argument; `errors/` and `engine.log` lie beside it.
        processes: What to start.
        on_poll: Called a few times a second, and once after the end.
        module: Runs on every rank.
        what: What it does, for the message about a failure.

    Raises:
        RankFailedError: A process failed.
        StoppedOnRequest: A signal asked to stop, and a checkpoint continues the run.
    """
    output_dir = spec_path.parent
    node = processes.nodes.node_rank
    log_path = output_dir / (f"engine.node{node}.log" if node else "engine.log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*processes.torchrun(output_dir.name), "-m", module, str(spec_path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(processes.per_node),
            start_new_session=True,
            preexec_fn=_prepare_torchrun,
        )
    ranks: set[psutil.Process] = set()
    try:
        with _usr1_like_sigterm():
            try:
                _wait(process, on_poll, ranks, processes.per_node)
            except (KeyboardInterrupt, SystemExit):
                _stop(process)
                if not (output_dir / STOPPED).exists():
                    raise
    finally:
        _end(process, ranks)
    on_poll()
    if process.returncode:
        raise RankFailedError(_describe_failure(what, output_dir, log_path, process.returncode))
    if (output_dir / STOPPED).exists():
        raise StoppedOnRequest(json.loads((output_dir / STOPPED).read_text(encoding="utf-8"))["step"])


def environment(nproc_per_node: int) -> dict[str, str]:
    """Return the environment of the training processes: the user's own, over these defaults."""
    threads = max(1, len(os.sched_getaffinity(0)) // nproc_per_node)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUTF8": "1",
        # Fast tokenizers warn, and stop using threads, when a loader process is forked.
        "TOKENIZERS_PARALLELISM": "false",
        # A collective that times out ends its process (the watchdog of NCCL does it), instead of blocking the host.
        "NCCL_BLOCKING_WAIT": "0",
        "TORCH_NCCL_BLOCKING_WAIT": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        # Rings, transports and interfaces of every rank: the first question when a job hangs or is slow. In engine.log.
        "NCCL_DEBUG": "INFO",
        # Parallel downloads of weights; what HF_HUB_ENABLE_HF_TRANSFER was before huggingface_hub 1.0.
        "HF_XET_HIGH_PERFORMANCE": "1",
    }
    # Restarted ranks otherwise meet at the store of the attempt before, and find the addresses of ranks that are gone.
    ours = {"PYTHONUNBUFFERED": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", LAUNCHER: str(os.getpid())}
    return {**defaults, **os.environ, **ours}


def _prepare_torchrun() -> None:
    """Between fork and exec of torchrun: end with the parent, and leave stopping to the ranks.

    Linux sends SIGHUP to torchrun when its parent dies, even by SIGKILL; torchrun then ends its ranks. Signals that ask
    to stop reach all processes of a job, and torchrun would end its ranks 30 s after: it ignores them, as its ranks do
    until they listen for them.
    """
    end_with_parent(signal.SIGHUP)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _usr1_like_sigterm() -> Iterator[None]:
    """Let SIGUSR1 do what SIGTERM does here: `kedro run` turns it into SystemExit."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _wait(
    process: subprocess.Popen[bytes], on_poll: Callable[[], None], ranks: set[psutil.Process], per_node: int
) -> None:
    while process.poll() is None:
        on_poll()
        if sum(map(_lives, ranks)) < per_node:  # all processes of the machine are looked through for them
            ranks |= _ranks(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the ranks to stop after their step, again and again: a rank that still starts does not listen yet."""
    print("train: stopping after this step, with a checkpoint; interrupt again to stop at once", flush=True)
    while process.poll() is None:
        for rank in _ranks(process):
            _signal_group(rank.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)


def _end(process: subprocess.Popen[bytes], ranks: set[psutil.Process]) -> None:
    """End what is left of the job; a checkpoint is whole or absent whenever that happens.

    Ranks end with torchrun, but not at once: this returns when all that were ever seen are gone.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # it must not start ranks while they are counted
        ranks |= _ranks(process)
        process.kill()
        process.wait()
    for rank in filter(_lives, ranks):
        _signal_group(rank.pid, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_S
    while any(map(_lives, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _lives(rank: psutil.Process) -> bool:
    """Whether it is still this very process, and not another of its number, nor a dead one that nobody asks after."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE
    return False


def _ranks(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """Find the ranks: torchrun makes each the leader of a session and process group of its own, with its loaders."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return set(psutil.Process(process.pid).children())
    return set()


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def _describe_failure(what: str, output_dir: Path, log_path: Path, returncode: int) -> str:
    """One block: the rank that failed first, where it was, and the last frames of its traceback."""
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8")) for path in (output_dir / "errors").glob("rank*.json")
    ]
    if not reports:
        if killed := re.findall(
            r"exitcode: -(\d+)\) local_rank: (\d+)", log_path.read_text(errors="replace", encoding="utf-8")
        ):
            number, rank = killed[-1]  # those before were restarted
            name = signal.Signals(int(number)).name
            likely = ": most likely the machine ran out of memory" if name == "SIGKILL" else ""
            return f"{what} ended because rank {rank} of this node was killed by {name}{likely}; log: {log_path}"
        # What torchrun appends about the failed process says less than the process itself did.
        lines = itertools.takewhile(lambda line: "torch/distributed/elastic" not in line, _lines(log_path))
        # And NCCL tells at length that it ends too.
        tail = "\n".join(f"    {line}" for line in [line for line in lines if " NCCL INFO " not in line][-15:])
        free = size_text(free_bytes(output_dir))
        return (
            f"{what} ended with status {returncode} and no error report ({free} are free there); the end of {log_path}:"
            f"\n{tail}"
        )
    first = min(reports, key=lambda report: report["time"])
    if first.get("mendable"):
        return f"{what} failed at step {first['step']}: {first['message']}"
    samples = ", ".join(first["sample_ids"][:5]) + (", …" if len(first["sample_ids"]) > 5 else "")
    frames = "\n".join(f"    {line}" for line in first["traceback"].rstrip().splitlines()[-8:])
    return (
        f"{what} failed on rank {first['rank']} at step {first['step']}: {first['type']}: {first['message']}\n"
        f"  samples in that micro-batch: {samples or 'none yet'}\n"
        f"  where:\n{frames}\n"
        f"  full log: {log_path}"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace", encoding="utf-8").splitlines()

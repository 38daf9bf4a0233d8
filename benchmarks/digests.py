"""What digests cost: how fast they are computed, and their share of the time of every data stage and of training.

The embedded example is run in this process, the engine too, with clocks around all that is done for digests: computing
them when something is written (of Arrow batches with the writing itself), and once more when it is first read. A second
figure of training is what a thread aside does for checkpoints, which nobody waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import report
from qvl_pipeline.ports import free_port

TARGETS = {"training": "<= 0.01", **dict.fromkeys(("ingest", "validate", "sample", "tokenize"), "<= 0.05")}
STAGES = ("ingest", "validate", "sample", "tokenize")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--quick", action="store_true", help="a size that only shows that it runs")
    options = parser.parse_args()
    speeds = hash_speeds(2**24 if options.quick else 2**28)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        rows, ratios = shares(Path(folder), 28 if options.quick else options.samples)
    ratios |= {"xxh3_over_crc32": speeds["xxh3"] / speeds["crc32"]}
    rows += [{"what": name, "seconds": None, "of_seconds": None, "gb_per_s": speed} for name, speed in speeds.items()]
    report("digests", rows, ratios=ratios, targets=TARGETS)


def hash_speeds(size: int) -> dict[str, float]:
    """Return the GB/s of one core with which digests are computed of bytes in memory, the best of three."""
    from xxhash import xxh3_64

    content = os.urandom(2**20) * (size // 2**20)
    hashers: dict[str, Callable[[bytes], Any]] = {"xxh3": xxh3_64, "crc32": zlib.crc32}
    hashers |= {"blake2b": hashlib.blake2b, "sha256": hashlib.sha256}
    speeds = {}
    for name, hasher in hashers.items():
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            hasher(content)
            seconds.append(time.perf_counter() - started)
        speeds[name] = len(content) / min(seconds) / 1e9
    return speeds


def shares(folder: Path, samples: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run the stages, and return a row for each with the time that digests took, and their share."""
    project, clock = _project(folder, samples), _Clock()
    rows = []
    for stage in STAGES:
        seconds, (waited, _) = _run(project, stage), clock.take()
        rows.append({"what": stage, "seconds": waited, "of_seconds": seconds, "gb_per_s": None})
    steps = _train_here(clock)
    _run(project, "train")
    for what, (inside, aside, seconds) in {"training": steps}.items():
        rows.append({"what": what, "seconds": inside, "of_seconds": seconds, "gb_per_s": None})
        rows.append({"what": f"{what}, aside", "seconds": aside, "of_seconds": seconds, "gb_per_s": None})
    return rows, {row["what"]: row["seconds"] / row["of_seconds"] for row in rows}


class _Clock:
    """Counts the time that this thread, and that others, spend on digests."""

    def __init__(self) -> None:
        """Put clocks around all functions that compute digests."""
        from qvl_pipeline.engine.run import checkpoint_files
        from qvl_pipeline.media.frames import store
        from qvl_pipeline.storage import batches, digests, soundness

        self._seconds = [0.0, 0.0]
        self._inside = threading.local()
        for module, names in (
            (batches, ("write_checked", "agrees")),
            (store, ("write_checked",)),
            (digests, ("agrees", "sealed", "write_digests", "damage_of")),
            (soundness, ("damage",)),
            (checkpoint_files, ("digest_of", "damage_of")),
        ):
            for name in names:
                setattr(module, name, self._timed(getattr(module, name)))

    def take(self) -> tuple[float, float]:
        """Return the seconds since the last call, of the main thread and of others."""
        taken, self._seconds = self._seconds, [0.0, 0.0]
        return taken[0], taken[1]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return function(*args, **options)
            self._inside.yes, started = True, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                aside = threading.current_thread() is not threading.main_thread()
                self._seconds[aside] += time.perf_counter() - started
                self._inside.yes = False

        return timed


def _project(folder: Path, samples: int) -> Path:
    from tests.kedro_project import make_project

    project = make_project(folder / "project")
    path = project / "conf" / "tiny_qwen3_vl" / "parameters.yml"
    blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
    blocks["ingest"]["demo"] |= {"train_samples": samples, "eval_samples": max(7, samples // 20)}
    blocks["validate"]["max_reject_fraction"] = 1.0
    blocks["batching"] |= {"num_train_epochs": 1, "data_parallel_size": 1}
    blocks["train"] |= {"nproc_per_node": 1, "save_steps": 10, "report_to": ["none"]}
    path.write_text(yaml.safe_dump(blocks), encoding="utf-8")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    os.chdir(project)
    return project


def _run(project: Path, stage: str) -> float:
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    bootstrap_project(project)
    started = time.perf_counter()
    with KedroSession.create(project_path=project) as session:
        session.run(pipeline_names=[stage])
    return time.perf_counter() - started


def _train_here(clock: _Clock) -> list[float]:
    """Let `train` run its engine in this process; return what will hold the seconds inside, aside and of all steps."""
    from qvl_pipeline.engine.__main__ import main as engine
    from qvl_pipeline.engine.trainer import Trainer
    from qvl_pipeline.training import running

    measured, trained = [0.0, 0.0, 0.0], Trainer._train

    def train(self: Trainer, *args: Any) -> None:
        clock.take()
        started = time.perf_counter()
        trained(self, *args)
        measured[:] = [*clock.take(), time.perf_counter() - started]

    def launch(spec_path: Path, *_: Any, **__: Any) -> None:
        port = free_port()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", GROUP_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if engine(spec_path):
            raise SystemExit("the engine failed")

    Trainer._train, running.launch = train, launch
    return measured


if __name__ == "__main__":
    main()

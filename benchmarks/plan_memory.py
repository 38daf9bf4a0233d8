"""Memory of a plan: of the node that makes it, and of a rank that trains by it: `python -m benchmarks.plan_memory`.

`[--samples 1000000] [--clips 100000]`. Each figure is the growth of the peak memory of a process of its own, over what
it has imported; files that are memory-mapped, which processes share and the system may drop, do not count. Measured are
making the plan, and adding up its work when a training starts; reading and sharing it out on one of eight ranks, with
the sources of the samples; the index of the frame store. `gib_at_10m` is what ten million samples (a million clips)
would take, the growth being even.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.report import report

RANKS = 8
BATCH_ROWS = 4096
FRAMES = 64


def main() -> None:
    """Run the benchmark and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--clips", type=int, default=100_000)
    options = parser.parse_args()
    rows = measure(options.samples, options.clips)
    figures = {row["case"]: row["gib_at_10m"] for row in rows}
    rank = sum(value for case, value in figures.items() if case.startswith("a rank"))
    launching = max(figures["making the plan"], figures["the start of a training"])
    ratios = {"launching_node_gib_at_10m": launching, "rank_gib_at_10m": rank}
    targets = {"launching_node_gib_at_10m": "<= 4", "rank_gib_at_10m": "<= 0.5"}
    report("plan_memory", rows, ratios=ratios, targets=targets)


def measure(samples: int, clips: int) -> list[dict[str, Any]]:
    """Measure each case in a process of its own."""
    with TemporaryDirectory() as folder:
        tokenized, plan, frames = (Path(folder) / name for name in ("tokenized.arrow", "plan.parquet", "frames"))
        cases = (
            (_write_samples, (tokenized, samples), "", 0),
            (make, (tokenized, plan), "making the plan", samples),
            (start, (tokenized, plan), "the start of a training", samples),
            (share_out, (tokenized, plan), "a rank: its steps, and the sources", samples),
            (_write_index, (frames, clips), "", 0),
            (open_index, (frames,), "a rank: the index of its frames", 10 * clips),
        )
        done = [(_in_a_process(function, *arguments), case, of) for function, arguments, case, of in cases]
    return [
        {"case": case, "samples": of, "seconds": seconds, "mib": grown / 2**20, "gib_at_10m": grown / of * 1e7 / 2**30}
        for (seconds, grown), case, of in done
        if case
    ]


def make(tokenized: Path, plan: Path) -> None:
    """Make the plan and write it, as the stage `tokenize` does."""
    from qvl_pipeline.config import BatchingConfig
    from qvl_pipeline.data.plan.steps import make_plan

    table, _ = make_plan(tokenized, BatchingConfig(packing_length=16_384, data_parallel_size=RANKS), {"a": 1, "b": 1})
    table.to_parquet(plan, index=False)


def start(tokenized: Path, plan: Path) -> None:
    """Do with the plan what the node that starts a training does: estimate its memory and its work, and copy it."""
    import pandas as pd

    from qvl_pipeline.preflight.packs import heaviest_planned, work_of
    from qvl_pipeline.storage.tables import write_table

    table = pd.read_parquet(plan)
    heaviest, work = heaviest_planned(table, tokenized, RANKS, 1), work_of(table, tokenized)
    write_table(pa.Table.from_pandas(table, preserve_index=False), plan.with_suffix(".copy"))
    if not heaviest or work.tokens != int(table["tokens"].sum()):
        raise RuntimeError(f"{work.tokens} tokens are added up of {table['tokens'].sum()}")


def share_out(tokenized: Path, plan: Path) -> None:
    """Do with the plan what a rank does before its first step, and take all steps."""
    from qvl_pipeline.engine.feed.steps import PlannedFeed, SharedSteps, read_plan
    from qvl_pipeline.media.arrow_rows import TokenizedSamples

    sources = TokenizedSamples(tokenized).columns(["source"])["source"].unique().to_pylist()
    feed = PlannedFeed(SharedSteps(read_plan(plan), 0, RANKS, 1))
    rows = sum(len(mb.sample_rows) for step in feed.steps_after(0) for mb in step.micro_batches)
    if not rows or sorted(sources) != ["a", "b"]:
        raise RuntimeError(f"{rows} rows of {sources} are shared out")


def open_index(frames: Path) -> None:
    """Open the frame store and look up a clip."""
    from qvl_pipeline.media.frames.store import FrameStore

    store = FrameStore(frames)
    if store.info("videos/0000007.mp4")["n_frames"] != FRAMES:
        raise RuntimeError("the index has another clip there")


def _in_a_process(function: Callable[..., None], *arguments: Any) -> tuple[float, int]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown, function, arguments).result()


def _grown(function: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, int]:
    """Seconds, and bytes by which the peak of this process grows over what the imports of all cases take."""
    import qvl_pipeline.preflight.packs  # noqa: F401

    pa.set_memory_pool(pa.system_memory_pool())  # which gives back what it does not hold
    before, started = _anonymous(), time.perf_counter()
    peaks, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function(*arguments)
    done.set()
    watcher.join()
    return time.perf_counter() - started, max(*peaks, _anonymous()) - before


def _anonymous() -> int:
    (kib,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024


def _write_samples(path: Path, count: int) -> None:
    """Samples of log-normal length; of their tokens only one each is there, which nothing here reads."""
    from qvl_pipeline.data.plan.tokenization import SCHEMA
    from qvl_pipeline.storage.batches import write_checked

    rng = np.random.default_rng(0)
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for number, start in enumerate(range(0, count, BATCH_ROWS)):
            rows = min(BATCH_ROWS, count - start)
            lengths = np.clip(rng.lognormal(6.0, 0.9, rows), 8, 16_000).astype(np.int32)
            one = {"task": "exact_match", "answer": "", "kind": "text", "split": "train", "prompt_length": 1}
            columns = {name: [value] * rows for name, value in one.items()}
            columns |= {
                "sample_id": [f"a/{start + row}" for row in range(rows)],
                "source": ["ab"[row % 2] for row in range(rows)],
                "input_ids": [[1]] * rows,
                "label_spans": [[]] * rows,
                "media": [[]] * rows,
                "length": lengths,
                "supervised_tokens": lengths // 2,
                "spectra": np.zeros(rows, np.int32),
                "vit_patches": np.where(rng.random(rows) < 0.5, 4 * (lengths // 8), 0).astype(np.int32),
            }
            batch = pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
            write_checked(writer, batch, number)


def _write_index(folder: Path, clips: int) -> None:
    from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip

    seconds, numbers = [n / 2 for n in range(FRAMES)], list(range(FRAMES))
    with FrameStoreWriter(folder) as writer:
        for number in range(clips):
            clip = f"videos/{number:07d}.mp4"
            writer.add(StoredClip(clip, None, None, 448, 448, 30.0, "raw", numbers, seconds, None))


if __name__ == "__main__":
    main()

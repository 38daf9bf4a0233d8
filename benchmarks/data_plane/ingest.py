"""Rows a second of `ingest` from JSONL, and that its memory does not grow with the file.

On a machine that does other things as well, the time that passes says little. `cpu_us_per_row` is the CPU time of all
processes, and `rows_per_second_of_two_cores` what two cores make by it that do nothing else.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.data_plane import Row, Section

_BAD_EVERY = 100


def measure(rows: int) -> Section:
    """Ingest `rows` rows and a tenth of them, each in a process of its own."""
    with TemporaryDirectory() as folder:
        (small, _), (large, cpu_seconds) = (_measure(Path(folder), count) for count in (rows // 10, rows))
    return Section(
        [small, large],
        ratios={
            "rows_per_second": large.per_second,
            "cpu_us_per_row": 1e6 * cpu_seconds / large.count,
            "rows_per_second_of_two_cores": 2 * large.count / cpu_seconds,
            "peak_gib": large.peak_gib,
            "memory_growth_over_10x_rows": large.peak_gib / small.peak_gib,
        },
        targets={
            "rows_per_second_of_two_cores": ">= 50000",
            "peak_gib": "<= 2",
            "memory_growth_over_10x_rows": "<= 1.1",
        },
    )


def write_rows(path: Path, count: int) -> None:
    """Write conversations about a picture, of some 500 bytes; one of a hundred is cut off."""
    with path.open("w") as file:
        for number in range(count):
            question = f"Describe picture {number} in a few words, please. " * 3
            answer = f"It shows the number {number} in black, on a background of a light grey. " * 2
            picture = {"type": "image_url", "image_url": {"url": f"images/{number % 5000}.jpg"}}
            content = [picture, {"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            line = json.dumps({"messages": turns, "id": number})
            file.write((line[:-9] if number % _BAD_EVERY == 0 else line) + "\n")


def _measure(folder: Path, count: int) -> tuple[Row, float]:
    path = folder / f"{count}.jsonl"
    write_rows(path, count)
    # The child is this very module: a process that has imported and done nothing else.
    command = [sys.executable, "-m", __name__, str(path)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(printed.splitlines()[-1])
    if (found["samples"], found["rejects"]) != (count - -(-count // _BAD_EVERY), -(-count // _BAD_EVERY)):
        raise RuntimeError(f"of {count} rows, {found} were read")
    return Row("JSONL to samples", count, found["seconds"], found["peak_gib"]), found["cpu_seconds"]


def _ingest(path: Path) -> None:
    """Run both nodes of the stage on a file, and print what it took."""
    import pyarrow.parquet as pq

    from qvl_pipeline.config import DataEngineConfig, IngestConfig
    from qvl_pipeline.pipelines.ingest.nodes import ingest_rows, prepare_raw

    source = {"name": "rows", "path": str(path), "data_folder": str(path.parent), "data_type": "jsonl"}
    config = IngestConfig(datasets=[source], cache_folder=str(path.parent / "cache"))
    started, cpu_before = time.perf_counter(), _cpu_seconds()
    writers = ingest_rows(config, prepare_raw(config), DataEngineConfig())
    tables = [path.with_suffix(f".{name}.parquet") for name in ("samples", "rejects")]
    for write, table in zip(writers, tables, strict=True):
        write(table)
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - cpu_before}
    counts = [pq.read_metadata(table).num_rows for table in tables]
    print(json.dumps({"samples": counts[0], "rejects": counts[1], "peak_gib": _peak_gib()} | spent))


def _cpu_seconds() -> float:
    """CPU time of this process and of all that it has started, also of those that have ended."""
    own = psutil.Process()
    while any(child.children() for child in own.children()):  # the server of processes has not counted them yet
        time.sleep(0.01)
    return sum(sum(process.cpu_times()[:4]) for process in (own, *own.children()))


def _peak_gib() -> float:
    # Not `ru_maxrss`, in which a process starts with the peak of its parent.
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 2**20


if __name__ == "__main__":
    _ingest(Path(sys.argv[1]))

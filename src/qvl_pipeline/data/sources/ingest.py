"""From the declared sources to one table of samples, and one of the rows that could not be read."""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_pipeline.config import DataEngineConfig, DatasetSource, IngestConfig
from qvl_pipeline.data.batches import TableWriter
from qvl_pipeline.data.made_with import made_with, with_attrs
from qvl_pipeline.data.progress import ingest_bar
from qvl_pipeline.data.runner import use_runner
from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.data.sources.files.readers import RowFiles
from qvl_pipeline.data.sources.finished import begin_part
from qvl_pipeline.data.sources.paths import project_path
from qvl_pipeline.data.sources.raw import fingerprint, hash_code
from qvl_pipeline.data.sources.remote import copy_remote, is_url
from qvl_pipeline.data.sources.row_workers import RowWorkers
from qvl_pipeline.data.sources.rows import assign_split
from qvl_pipeline.data.tables import MEDIA, REJECTS, SAMPLES

# Share of the memory limit that a slab of raw rows may take: parsed, converted and written, it is many times as large.
_SLABS_IN_LIMIT = 64

_LOGGER = logging.getLogger(__name__)


def ingest_sources(
    config: IngestConfig, files: Sequence[dict[str, Any]], engine: DataEngineConfig, folder: Path
) -> None:
    """Read every row of every source, and write `samples.parquet` and `rejects.parquet`.

    The rows are in the order of the sources and of their files; each is in one of the tables. Memory depends on
    `engine.memory_limit_gib`, not on the number of rows; the bytes written do not depend on `engine` at all.

    What is done is kept in `cache_folder` until all is: after an interruption, it is not done again.

    Args:
        config: Declared sources, and how splits are assigned.
        files: Files of the raw manifest: `source` and `path` of each, those of a source in order.
        engine: Where to work, and with how much memory.
        folder: Where to write.

    Raises:
        UserError: A file as a whole cannot be read.
    """
    use_runner(engine)
    names = [[source.name, source.path] for source in config.datasets]
    finished = Path(config.cache_folder) / "unfinished" / fingerprint(names)[:16]
    with ExitStack() as stack:
        schema = with_attrs(SAMPLES, made_with({}, ingest=config))
        samples = stack.enter_context(TableWriter(folder / "samples.parquet", schema))
        rejects = stack.enter_context(TableWriter(folder / "rejects.parquet", REJECTS))
        row_files = stack.enter_context(RowFiles(_limits(engine)))
        workers = stack.enter_context(RowWorkers(engine))
        bar = stack.enter_context(ingest_bar())
        for source in config.datasets:
            own = [file for file in files if file["source"] == source.name]
            task = bar.add_task(source.name, total=sum(file["bytes"] for file in own), rows=0)
            read = rejected = 0
            for rows, done_bytes in _read_source(source, own, row_files, workers, config, engine, finished):
                rows = _number(rows, source.name, read)
                bad = rows.filter(pc.is_valid(rows["rule"]))
                rejects.write(bad.select(REJECTS.names).cast(REJECTS))
                samples.write(_as_samples(rows.filter(pc.is_null(rows["rule"])), source, config))
                read, rejected = read + rows.num_rows, rejected + bad.num_rows
                bar.update(task, completed=done_bytes, rows=read)
                del rows, bad  # slices, which keep all of the slab in memory
            level = logging.INFO if read else logging.WARNING
            _LOGGER.log(level, "%s: %s rows read, %s of them rejected", source.name, f"{read:,}", f"{rejected:,}")
    shutil.rmtree(finished, ignore_errors=True)


def _read_source(
    source: DatasetSource,
    files: Sequence[dict[str, Any]],
    row_files: RowFiles,
    workers: RowWorkers,
    config: IngestConfig,
    engine: DataEngineConfig,
    finished: Path,
) -> Iterator[tuple[pa.Table, float]]:
    """Yield the rows of a source piece by piece, and how many bytes of its files are read with each."""
    read = before = 0
    # With the code and the file itself, what decides what is read.
    folders = [other.data_folder for other in config.datasets]
    settings = [
        source.model_dump(),
        config.model_dump(exclude={"datasets"}),
        folders,
        str(Path.cwd()),
        asdict(_limits(engine)),
    ]
    code = hash_code(Path(__file__).parent)
    begun: deque[tuple[Callable[[], pa.Table], float]] = deque()
    for file in files:
        if read == source.limit:
            break
        for slab in row_files.slabs(Path(file["path"]), source.data_type):
            if read == source.limit:
                break
            rows = slab.rows if source.limit is None else slab.rows.slice(0, source.limit - read)
            work = partial(workers.start, source, config, file.get("split"), rows, file["path"])
            begun.append((begin_part(finished, [code, settings, file, read], work), before + slab.done * file["bytes"]))
            read += rows.num_rows
            del slab, rows, work  # of the same rows
            while len(begun) > workers.ahead:
                yield from _pieces(*begun.popleft(), engine.batch_rows)
        before += file["bytes"]
    while begun:
        yield from _pieces(*begun.popleft(), engine.batch_rows)


def _pieces(finish: Callable[[], pa.Table], done_bytes: float, batch_rows: int) -> Iterator[tuple[pa.Table, float]]:
    table = finish()
    for start in range(0, table.num_rows, batch_rows):
        yield table.slice(start, batch_rows), done_bytes


def _limits(engine: DataEngineConfig) -> Limits:
    memory = int(engine.memory_limit_gib * 2**30)
    return Limits(memory, memory // _SLABS_IN_LIMIT)


def _number(rows: pa.Table, source: str, first: int) -> pa.Table:
    """Add `source` and `row`, and say in each detail which row it is about."""
    numbers = pa.array(range(first, first + rows.num_rows), pa.int64())
    details = pc.binary_join_element_wise("row ", numbers.cast(pa.string()), ": ", rows["detail"], "")
    rows = rows.set_column(rows.column_names.index("detail"), "detail", details)
    return rows.append_column("row", numbers).append_column("source", pa.array([source] * rows.num_rows, pa.string()))


def _as_samples(rows: pa.Table, source: DatasetSource, config: IngestConfig) -> pa.Table:
    ids = pc.binary_join_element_wise(rows["source"], rows["row"].cast(pa.string()), "/")
    pairs = zip(rows["split"].to_pylist(), ids.to_pylist(), strict=True)
    splits = pa.array([split or assign_split(sample_id, config) for split, sample_id in pairs], pa.string())
    rows = rows.set_column(rows.column_names.index("split"), "split", splits).append_column("sample_id", ids)
    samples = rows.select(SAMPLES.names).cast(SAMPLES)
    return _with_copies(samples, source, config) if is_url(source.data_folder) else samples


def _with_copies(samples: pa.Table, source: DatasetSource, config: IngestConfig) -> pa.Table:
    """Copy media that are behind a URL, and name the copies. One that is not there keeps its URL, for validation."""
    urls = {use["path"] for uses in samples["media"].to_pylist() for use in uses if is_url(use["path"])}
    copies = copy_remote(urls, source.storage_options, Path(config.cache_folder) / "remote")
    paths = {url: project_path(copy) for url, copy in copies.items() if copy is not None}
    media = [
        [{**use, "path": paths.get(use["path"], use["path"])} for use in uses] for uses in samples["media"].to_pylist()
    ]
    return samples.set_column(SAMPLES.names.index("media"), SAMPLES.field("media"), pa.array(media, MEDIA))

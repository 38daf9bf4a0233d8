"""Writing the frame store: clips read side by side in processes, written in order, whatever becomes of a process."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import pyarrow as pa

from qvl_pipeline.config import SampleConfig
from qvl_pipeline.data.frames.clips import Clip, clip_key, estimated_bytes, read_clip, stored_again
from qvl_pipeline.data.frames.sounds import Sound, read_stored
from qvl_pipeline.data.made_with import Attrs, write_record
from qvl_pipeline.data.progress import progress_bar
from qvl_pipeline.errors import UserError
from qvl_pipeline.families.hearing import Hearing
from qvl_pipeline.media.frames.cache import FrameCache
from qvl_pipeline.media.frames.decode_worker import DecodeWorker, Failure
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.media.sound.store import SoundStoreWriter
from qvl_pipeline.storage.room import size_text
from qvl_pipeline.storage.tables import write_table

logger = logging.getLogger(__name__)

FAILURES = pa.schema([("clip_id", pa.string()), ("path", pa.string()), ("rule", pa.string()), ("detail", pa.string())])
GIB = 1 << 30
# A process with PyAV and torch loaded, and the decoder's own pictures.
PROCESS_BYTES = GIB // 2
# Clips read ahead of the one that is written, for each process.
READ_AHEAD = 2


def write_store(
    folder: Path,
    *,
    clips: Sequence[Clip],
    unfit: Sequence[tuple[Clip, Failure]],
    sounds: Sequence[Sound] = (),
    hearing: Hearing | None = None,
    sample: SampleConfig,
    attrs: Attrs,
    **reading: str,
) -> None:
    """Write the frame store of the clips, their sounds and others, and `failures.parquet` with what could not be read.

    Args:
        folder: Folder to write into.
        clips: Clips to sample.
        unfit: Clips that are known not to fit the parameters.
        sounds: Sounds to make spectrograms of.
        hearing: How the model hears; `None` does not.
        sample: Parameters.
        attrs: The parameters that all of it is made with.
        **reading: `patch_size` and `backend`.

    Raises:
        UserError: Memory or disk do not suffice; nothing is decoded then.
    """
    cache = FrameCache(Path(sample.frame_cache)) if sample.frame_cache and sample.materialize else None
    keys = [clip_key(clip, sample, **reading) for clip in clips]
    failures: list[tuple[Clip | Sound, Failure]] = list(unfit)
    with FrameStoreWriter(folder, cache=cache) as store, progress_bar() as bar:
        done = store.add_finished([(clip.path, clip.start, clip.end) for clip in clips], keys)
        rest = clips[done:]
        sizes = [estimated_bytes(clip, sample, reading["patch_size"]) for clip in rest]
        if sample.materialize:
            _check_space(folder, sum(sizes))
        outcomes = _read_in_order(
            rest,
            partial(_cached, cache, dict(zip(clips, keys, strict=True))),
            partial(read_clip, sample=sample, **reading),
            workers=_count_workers(rest, sizes, sample),
            timeout_s=sample.decode_timeout_s,
        )
        task = bar.add_task("Clips", total=len(clips), completed=done, visible=bool(clips))
        with closing(outcomes):
            for clip, key, outcome in zip(rest, keys[done:], outcomes, strict=True):
                if isinstance(outcome, Failure):
                    logger.warning("clip '%s' is left out: %s: %s", clip.name, outcome.rule, outcome.detail)
                    failures.append((clip, outcome))
                else:
                    store.add(outcome, key)
                bar.advance(task)
    if hearing is not None:
        failures += _write_sounds(folder, sounds, hearing, sample)
    rows = [{"clip_id": clip.name, "path": clip.path, **vars(failure)} for clip, failure in failures]
    write_table(pa.Table.from_pylist(rows, schema=FAILURES), folder / "failures.parquet")
    write_record(folder, attrs)
    if cache is not None:
        cache.prune()


def _write_sounds(
    folder: Path, sounds: Sequence[Sound], hearing: Hearing, sample: SampleConfig
) -> list[tuple[Sound, Failure]]:
    """Write the spectrograms beside the frames; return the sounds that there are none of."""
    failures = []
    read = partial(read_stored, hearing=hearing, materialize=sample.materialize)
    workers = min(sample.num_workers or len(os.sched_getaffinity(0)), max(1, len(sounds)))
    with SoundStoreWriter(folder, hearing.mel_bins) as store, progress_bar() as bar:
        task = bar.add_task("Sounds", total=len(sounds), visible=bool(sounds))
        outcomes = _read_in_order(sounds, lambda _: None, read, workers=workers, timeout_s=sample.decode_timeout_s)
        with closing(outcomes):
            for sound, outcome in zip(sounds, outcomes, strict=True):
                if isinstance(outcome, Failure):
                    logger.warning("sound '%s' is left out: %s: %s", sound.name, outcome.rule, outcome.detail)
                    failures.append((sound, outcome))
                else:
                    store.add(outcome)
                bar.advance(task)
    return failures


def _cached(cache: FrameCache | None, keys: dict[Clip, str], clip: Clip) -> StoredClip | None:
    found = cache.clip(keys[clip]) if cache is not None else None
    return stored_again(clip, found[0], found[1].column("frame")) if found else None


def _read_in_order(
    clips: Sequence[Clip],
    cached: Callable[[Clip], StoredClip | None],
    read: Callable[[Clip], StoredClip],
    *,
    workers: int,
    timeout_s: float,
) -> Iterator[StoredClip | Failure]:
    """Read clips side by side, yield them in order, and hold no more than `READ_AHEAD` of them for each process."""
    processes = [DecodeWorker(read, timeout_s) for _ in range(workers)]
    idle: SimpleQueue[DecodeWorker] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def read_one(clip: Clip) -> StoredClip | Failure:
        if (found := cached(clip)) is not None:
            return found
        process = idle.get()
        try:
            return process.read(clip)
        finally:
            idle.put(process)

    pool = ThreadPoolExecutor(workers)
    try:
        yield from _in_order(pool, read_one, clips, READ_AHEAD * workers)
    finally:
        # Not waited for: a thread may be starting a process, which takes seconds, and ends it then.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.close()


def _in_order(
    pool: ThreadPoolExecutor, read: Callable[[Clip], StoredClip | Failure], clips: Sequence[Clip], window: int
) -> Iterator[StoredClip | Failure]:
    coming = iter(clips)
    pending: deque[Future[StoredClip | Failure]] = deque(pool.submit(read, clip) for clip in islice(coming, window))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(read, clip) for clip in islice(coming, 1))


def _count_workers(clips: Sequence[Clip], sizes: Sequence[int], sample: SampleConfig) -> int:
    """As many processes as were asked for, or as fit into the memory when each reads the largest of the clips."""
    asked = sample.num_workers or len(os.sched_getaffinity(0))
    if not clips:
        return 1
    largest, clip = max(zip(sizes, clips, strict=True), key=lambda pair: pair[0])
    # In its process the clip is there encoded, and once more while it is sent.
    each = PROCESS_BYTES + (2 + READ_AHEAD) * largest * sample.materialize
    fitting = int(sample.memory_gib * GIB // each)
    if fitting == 0:
        raise UserError(
            f"clip '{clip.name}' needs about {each / GIB:.1f} GiB to be sampled, more than sample.memory_gib "
            f"({sample.memory_gib:g}): raise it, or lower sample.video_max_frames or sample.video_max_pixels"
        )
    if fitting < asked:
        logger.info("sample.memory_gib (%g) lets %d of %d decoding processes run", sample.memory_gib, fitting, asked)
    return min(asked, fitting)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"about {size_text(needed)} of frames are to be written to {folder.parent}, but {size_text(free)} "
            "are free there: free some, lower sample.video_max_frames or sample.video_max_pixels, or set "
            "sample.frame_encoding: jpeg or sample.materialize: false"
        )

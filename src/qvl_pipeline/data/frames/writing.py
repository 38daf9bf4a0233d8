"""Writing the frame store: clips read side by side, written in order, whatever becomes of who reads them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from qvl_pipeline.config import DataEngineConfig, SampleConfig
from qvl_pipeline.data.frames.clips import Clip, clip_key, estimated_bytes, read_clip, stored_again
from qvl_pipeline.data.frames.reading import READ_AHEAD, DecodeProcesses, decode_tasks, read_in_order
from qvl_pipeline.data.frames.sounds import Sound, read_stored
from qvl_pipeline.data.made_with import Attrs, write_record
from qvl_pipeline.data.progress import progress_bar
from qvl_pipeline.data.spread import RayTasks
from qvl_pipeline.errors import UserError
from qvl_pipeline.families.hearing import Hearing
from qvl_pipeline.media.frames.cache import FrameCache
from qvl_pipeline.media.frames.decode_worker import Failure
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip
from qvl_pipeline.media.sound.store import SoundStoreWriter
from qvl_pipeline.storage.room import size_text
from qvl_pipeline.storage.tables import write_table

logger = logging.getLogger(__name__)

FAILURES = pa.schema([("clip_id", pa.string()), ("path", pa.string()), ("rule", pa.string()), ("detail", pa.string())])
GIB = 1 << 30
# A process with PyAV and torch loaded, and the decoder's own pictures.
PROCESS_BYTES = GIB // 2


def write_store(
    folder: Path,
    *,
    clips: Sequence[Clip],
    unfit: Sequence[tuple[Clip, Failure]],
    sounds: Sequence[Sound] = (),
    hearing: Hearing | None = None,
    sample: SampleConfig,
    engine: DataEngineConfig,
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
        engine: Where to read clips; they are written here.
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
        outcomes = read_in_order(
            rest,
            _readers(partial(read_clip, sample=sample, **reading), rest, sizes, sample, engine),
            partial(_cached, cache, dict(zip(clips, keys, strict=True))),
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
        failures += _write_sounds(folder, sounds, hearing, sample, engine)
    rows = [{"clip_id": clip.name, "path": clip.path, **vars(failure)} for clip, failure in failures]
    write_table(pa.Table.from_pylist(rows, schema=FAILURES), folder / "failures.parquet")
    write_record(folder, attrs)
    if cache is not None:
        cache.prune()


def _write_sounds(
    folder: Path, sounds: Sequence[Sound], hearing: Hearing, sample: SampleConfig, engine: DataEngineConfig
) -> list[tuple[Sound, Failure]]:
    """Write the spectrograms beside the frames; return the sounds that there are none of."""
    failures = []
    read = partial(read_stored, hearing=hearing, materialize=sample.materialize)
    with SoundStoreWriter(folder, hearing.mel_bins) as store, progress_bar() as bar:
        task = bar.add_task("Sounds", total=len(sounds), visible=bool(sounds))
        readers = _readers(read, sounds, [0] * len(sounds), sample, engine)
        with closing(read_in_order(sounds, readers)) as outcomes:
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


def _readers(
    read: Callable[[Any], Any],
    media: Sequence[Clip | Sound],
    sizes: Sequence[int],
    sample: SampleConfig,
    engine: DataEngineConfig,
) -> DecodeProcesses | RayTasks:
    """Return who reads clips or sounds, so many at a time that the largest fit into memory."""
    if engine.runner == "ray":
        each = _process_bytes(media, sizes, sample)
        return decode_tasks(read, sample.decode_timeout_s, memory=each, most=sample.num_workers)
    return DecodeProcesses(read, sample.decode_timeout_s, _count_workers(media, sizes, sample))


def _process_bytes(media: Sequence[Clip | Sound], sizes: Sequence[int], sample: SampleConfig) -> int:
    """Say what a process needs that reads the largest of the media, which must not be more than there may be."""
    # In its process the clip is there encoded, and once more while it is sent.
    each = PROCESS_BYTES + (2 + READ_AHEAD) * max(sizes, default=0) * sample.materialize
    if media and each > sample.memory_gib * GIB:
        largest = media[max(range(len(media)), key=sizes.__getitem__)]
        raise UserError(
            f"clip '{largest.name}' needs about {each / GIB:.1f} GiB to be sampled, more than sample.memory_gib "
            f"({sample.memory_gib:g}): raise it, or lower sample.video_max_frames or sample.video_max_pixels"
        )
    return each


def _count_workers(media: Sequence[Clip | Sound], sizes: Sequence[int], sample: SampleConfig) -> int:
    """As many processes as were asked for, or as fit into the memory when each reads the largest of the clips."""
    asked = sample.num_workers or len(os.sched_getaffinity(0))
    if not media:
        return 1
    fitting = int(sample.memory_gib * GIB // _process_bytes(media, sizes, sample))
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

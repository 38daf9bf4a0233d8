"""The frames of every clip as the model sees them, with their seconds: written once, read memory-mapped.

A store may also hold all of a clip but its frames, which are then decoded whenever they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.cache import INDEX_SCHEMA, FrameCache
from qvl_pipeline.media.frames.encoding import decode_frame
from qvl_pipeline.storage.batches import CheckedBatches, Shards, write_checked
from qvl_pipeline.storage.digests import damaged

_SAMPLE_AGAIN = "run `kedro run --pipelines sample` (with the same --env and --params) to write them again"
# What a killed run may have to decode again.
SHARD_BYTES = 1 << 28
AGAIN = "run the pipeline 'sample' again"
INDEX, INDEX_ROWS = "index.arrow", 1024
FRAME_SCHEMA = pa.schema([("frame", pa.binary()), ("second", pa.float64()), ("index", pa.int64())])


@dataclass(frozen=True)
class StoredClip:
    """The sampled frames of one clip.

    Attributes:
        path: Source file.
        start: First second that may be sampled, or `None`.
        end: Last second that may be sampled, or `None`.
        height: Height of the frames in pixels.
        width: Width of the frames in pixels.
        source_fps: Frames per second of the source.
        encoding: How the frames are encoded.
        frame_indices: Number of each frame in the source.
        seconds: Presentation time of each frame in the source.
        frames: The encoded frames; `None` when they are to be decoded whenever they are read.
        backend: Decoder.
        content_hash: Sha256 of the source file.
    """

    path: str
    start: float | None
    end: float | None
    height: int
    width: int
    source_fps: float
    encoding: str
    frame_indices: list[int]
    seconds: list[float]
    frames: Sequence[bytes] | pa.BinaryArray | None
    backend: str = "pyav"
    content_hash: str | None = None


def clip_id(path: str, start: float | None, end: float | None) -> str:
    """Name of a clip: `path`, or `path#start-end` for a part of it, an open end being empty."""
    if start is None and end is None:
        return path
    return f"{path}#{'' if start is None else float(start)}-{'' if end is None else float(end)}"


class FrameStoreWriter:
    """Writes a frame store: Arrow IPC shards with one record batch per clip, and `index.arrow` at the end."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, cache: FrameCache | None = None) -> None:
        """Start a store.

        Args:
            folder: Folder to write into; made when missing.
            shard_bytes: A shard that has grown to this size is closed.
            cache: Takes every finished shard in, at once: it survives when this process does not.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shard_bytes = shard_bytes
        self._cache = cache
        self._rows: list[dict[str, Any]] = []
        self._keys: list[str] = []  # of the clips in the open shard, which are the last ones of `_rows`
        self._shards = 0
        self._writer: pa.RecordBatchFileWriter | None = None
        self._batches = self._bytes = 0

    def __enter__(self) -> Self:
        """Enter the context, at whose end the store is complete."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the shard; write the index unless an error, or an interrupt, left the store incomplete.

        What the open shard holds then goes into the cache too: its clips are not decoded again.
        """
        if error is not None:
            with contextlib.suppress(OSError):  # of a full disk, which is the error
                self._close_shard()
            return
        self._close_shard()
        with pa.ipc.new_file(str(self._folder / INDEX), INDEX_SCHEMA) as writer:
            for number, start in enumerate(range(0, len(self._rows), INDEX_ROWS)):
                rows = self._rows[start : start + INDEX_ROWS]
                write_checked(writer, pa.RecordBatch.from_pylist(rows, schema=INDEX_SCHEMA), number)

    def add(self, clip: StoredClip, key: str = "") -> None:
        """Append one clip.

        Args:
            clip: The clip.
            key: What it is made from, for the cache.
        """
        row = {name: value for name, value in vars(clip).items() if name != "frames"}
        row |= {"clip_id": clip_id(clip.path, clip.start, clip.end), "n_frames": len(clip.frame_indices)}
        if clip.frames is None:
            self._rows.append(row)
            return
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._folder / self._shard_name), FRAME_SCHEMA)
        columns = {"frame": clip.frames, "second": clip.seconds, "index": clip.frame_indices}
        batch = pa.record_batch(columns, schema=FRAME_SCHEMA)
        write_checked(self._writer, batch, self._batches)
        self._rows.append(row | {"shard": self._shard_name, "batch": self._batches})
        self._keys.append(key)
        self._batches += 1
        self._bytes += batch.nbytes
        if self._bytes >= self._shard_bytes:
            self._close_shard()

    def add_finished(self, clips: Sequence[tuple[str, float | None, float | None]], keys: Sequence[str]) -> int:
        """Take over the shards that this store would begin with, from the cache.

        Args:
            clips: Path, start and end of the clips to come.
            keys: What they are made from.

        Returns:
            How many clips that settles.
        """
        done = 0
        while self._cache is not None and (shard := self._cache.shard(keys[done:], self._shard_bytes)):
            self._cache.link_or_copy(shard.path, self._folder / self._shard_name)
            for (path, start, end), row in zip(clips[done:], shard.rows, strict=False):
                names = {"clip_id": clip_id(path, start, end), "path": path, "start": start, "end": end}
                self._rows.append(row | names | {"shard": self._shard_name})
            done += len(shard.rows)
            self._shards += 1
        return done

    @property
    def _shard_name(self) -> str:
        return f"frames-{self._shards:05d}.arrow"

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        if self._cache is not None:
            rows = self._rows[-len(self._keys) :]
            self._cache.keep(self._folder / self._shard_name, self._keys, rows, INDEX_SCHEMA)
        self._writer = None
        self._keys = []
        self._batches = self._bytes = 0
        self._shards += 1


class FrameStore:
    """Reads a frame store. Shards are memory-mapped when first needed; objects can be pickled."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Args:
            folder: Folder written by the `sample` stage.

        Raises:
            UserError: The folder holds no finished store.
        """
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.exists():
            raise UserError(f"{path} is missing: run the pipeline 'sample', which writes the frames of every clip")
        # Memory-mapped: the frames' numbers and seconds of a million clips are a gigabyte, which ranks share this way.
        self._index = CheckedBatches(path, AGAIN)
        if not self._index.schema.equals(INDEX_SCHEMA):
            raise damaged(path, f"its columns are {', '.join(self._index.schema.names)}", AGAIN)
        self._places = _Places(self)
        self._shards = Shards(self.folder, AGAIN)

    def __reduce__(self) -> tuple[type[FrameStore], tuple[Path]]:
        """Pickle as the folder."""
        return FrameStore, (self.folder,)

    def check_shards(self) -> None:
        """Check the index, and open all shards, without reading frames.

        Before processes do, one by one and hours into their work.

        Raises:
            UserError: A shard is missing or cut off; it names the first, and the stage to run.
        """
        self._index.check()
        shards = self.columns(["shard", "batch"]).group_by("shard").aggregate([("batch", "max")]).to_pylist()
        for row in sorted((row for row in shards if row["shard"] is not None), key=lambda row: row["shard"]):
            path = self.folder / row["shard"]
            try:
                found = pa.ipc.open_file(pa.memory_map(str(path))).num_record_batches
            except (OSError, pa.ArrowInvalid) as error:
                what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
                raise UserError(f"frames are lost, {path} {what}: {_SAMPLE_AGAIN}") from error
            if found <= row["batch_max"]:
                raise UserError(f"frames are lost, {path} has {found} clips, fewer than the index: {_SAMPLE_AGAIN}")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        """Clip ids, in the order in which they were written."""
        for number in range(len(self._index)):
            yield from self._index.batch(number, ["clip_id"]).column("clip_id").to_pylist()

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Read whole columns of the index, in its order."""
        schema = pa.schema([INDEX_SCHEMA.field(name) for name in names])
        numbers = range(len(self._index))
        return pa.Table.from_batches([self._index.batch(n, names).select(names) for n in numbers], schema)

    def info(self, clip: str) -> dict[str, Any]:
        """Look up one clip.

        Args:
            clip: Clip id.

        Returns:
            Its row of `index.arrow`.

        Raises:
            UserError: The store has no such clip.
        """
        for place in self._places.of(clip):
            number, row = divmod(place, INDEX_ROWS)
            if self._index.batch(number, ["clip_id"]).column("clip_id")[row].as_py() == clip:
                return self._index.batch(number).slice(row, 1).to_pylist()[0]
        raise UserError(f"{self.folder} holds no frames of '{clip}': run the pipeline 'sample' again")

    def frames(self, clip: str, part: slice = slice(None)) -> np.ndarray:
        """Read the frames of one clip.

        Args:
            clip: Clip id.
            part: Which of them; the others are not decoded.

        Returns:
            Uint8 `[T, 3, H, W]`. With the encoding `raw` a read-only view of the memory map, at no cost.

        Raises:
            UserError: The store has no such clip; or its frames are not what was written (a `DamagedError`), or not
                stored, and the file cannot be decoded.
        """
        info = self.info(clip)
        if info["shard"] is None:
            from qvl_pipeline.media.frames.clips import frames_from_source  # needs PyAV, which stored frames do not

            return frames_from_source(info, part)
        frames = self._shards[info["shard"]].batch(info["batch"], ["frame"]).column("frame")
        if info["encoding"] == "raw":
            offsets = np.frombuffer(frames.buffers()[1], dtype=np.int32, count=len(frames) + 1)
            pixels = np.frombuffer(frames.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
            return pixels.reshape(info["n_frames"], 3, info["height"], info["width"])[part]
        frames = frames[part]
        decoded = np.empty((len(frames), 3, info["height"], info["width"]), dtype=np.uint8)
        for frame, out in zip(frames, decoded, strict=True):
            decode_frame(frame.as_buffer(), info["encoding"], out)
        return decoded


class _Places:
    """Rows of clips by their ids: a sorted number of each id is 16 bytes a clip, a dictionary takes ten times that."""

    def __init__(self, clips: Iterable[str]) -> None:
        numbers = np.fromiter(map(hash, clips), dtype=np.int64)
        self._rows = np.argsort(numbers, kind="stable")
        self._numbers = numbers[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, clip: str) -> list[int]:
        """Rows whose ids have the number that this one has, the last written first, which is the one that counts."""
        start, end = (np.searchsorted(self._numbers, hash(clip), side) for side in ("left", "right"))
        return self._rows[start:end][::-1].tolist()

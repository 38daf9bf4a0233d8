"""The frames of every clip as the model sees them, with their seconds: written once, read memory-mapped.

A store may also hold all of a clip but its frames, which are then decoded whenever they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frame_cache import INDEX_SCHEMA, FrameCache
from qvl_pipeline.media.frame_encoding import decode_frame
from qvl_pipeline.storage.batches import CheckedBatches, write_checked
from qvl_pipeline.storage.digests import DamagedError
from qvl_pipeline.storage.tables import read_table, write_table

_SAMPLE_AGAIN = "run `kedro run --pipelines sample` (with the same --env and --params) to write them again"
# What a killed run may have to decode again.
SHARD_BYTES = 1 << 28
AGAIN = "run the pipeline 'sample' again"
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
    """Writes a frame store: Arrow IPC shards with one record batch per clip, and `index.parquet` at the end."""

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
        write_table(pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA), self._folder / "index.parquet")

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
        path = self.folder / "index.parquet"
        if not path.exists():
            raise UserError(f"{path} is missing: run the pipeline 'sample', which writes the frames of every clip")
        self._index = read_table(path, INDEX_SCHEMA, advice=AGAIN)
        self._rows = {name: row for row, name in enumerate(self._index.column("clip_id").to_pylist())}
        self._shards: dict[str, CheckedBatches] = {}

    def __reduce__(self) -> tuple[type[FrameStore], tuple[Path]]:
        """Pickle as the folder."""
        return FrameStore, (self.folder,)

    def check_shards(self) -> None:
        """Open all shards, without reading frames: before processes do, one by one and hours into their work.

        Raises:
            UserError: A shard is missing or cut off; it names the first, and the stage to run.
        """
        shards = self._index.select(["shard", "batch"]).group_by("shard").aggregate([("batch", "max")]).to_pylist()
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
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        """Clip ids, in the order in which they were written."""
        return iter(self._rows)

    def info(self, clip: str) -> dict[str, Any]:
        """Look up one clip.

        Args:
            clip: Clip id.

        Returns:
            Its row of `index.parquet`.

        Raises:
            UserError: The store has no such clip.
        """
        if clip not in self._rows:
            raise UserError(f"{self.folder} holds no frames of '{clip}': run the pipeline 'sample' again")
        return self._index.slice(self._rows[clip], 1).to_pylist()[0]

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
            from qvl_pipeline.media.clip_frames import frames_from_source  # needs PyAV, which stored frames do not

            return frames_from_source(info)[part]
        frames = self._shard(info["shard"]).batch(info["batch"], ["frame"]).column("frame")
        if info["encoding"] == "raw":
            offsets = np.frombuffer(frames.buffers()[1], dtype=np.int32, count=len(frames) + 1)
            pixels = np.frombuffer(frames.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
            return pixels.reshape(info["n_frames"], 3, info["height"], info["width"])[part]
        frames = frames[part]
        decoded = np.empty((len(frames), 3, info["height"], info["width"]), dtype=np.uint8)
        for frame, out in zip(frames, decoded, strict=True):
            decode_frame(frame.as_buffer(), info["encoding"], out)
        return decoded

    def _shard(self, name: str) -> CheckedBatches:
        if name not in self._shards:
            try:
                self._shards[name] = CheckedBatches(self.folder / name, AGAIN)
            except FileNotFoundError as error:
                raise DamagedError(f"{self.folder / name} is missing: {AGAIN}") from error
        return self._shards[name]

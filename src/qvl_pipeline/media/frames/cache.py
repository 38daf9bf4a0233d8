"""Finished shards of frame stores, kept by what they were made from: no clip is decoded twice under the same rules."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from qvl_pipeline.storage.batches import CheckedBatches
from qvl_pipeline.storage.digests import DamagedError
from qvl_pipeline.storage.tables import read_table, write_table

logger = logging.getLogger(__name__)

_ADVICE = "its clips are decoded again"
# Of `index.arrow` of a store.
INDEX_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("path", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("shard", pa.string()),
        ("batch", pa.int32()),
        ("n_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("source_fps", pa.float64()),
        ("encoding", pa.string()),
        ("backend", pa.string()),
        ("content_hash", pa.string()),
        ("frame_indices", pa.list_(pa.int64())),
        ("seconds", pa.list_(pa.float64())),
    ]
)
# The cache has the same rows, each with what its clip was made from.
_TABLE = INDEX_SCHEMA.append(pa.field("key", pa.string()))


@dataclass(frozen=True)
class CachedShard:
    """A finished shard.

    Attributes:
        path: The Arrow file.
        keys: What each of its clips was made from, in their order.
        rows: Their rows of the index.
    """

    path: Path
    keys: list[str]
    rows: list[dict[str, Any]]


class FrameCache:
    """A folder of shards, each with a table of the clips in it. Shards are hard links to those of the stores.

    So they take no space of their own; those that no store holds any more are removed by `prune`. And what damages a
    store damages the cache: nothing is handed out of it that does not have its digests, and what has not is removed.
    """

    def __init__(self, folder: Path) -> None:
        """Read the tables.

        Args:
            folder: Folder of the cache; made when missing.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clips: dict[str, tuple[CachedShard, int]] = {}
        self._by_first_key: dict[str, list[CachedShard]] = {}
        self._batches: dict[Path, CheckedBatches] = {}
        self._links = False
        for table in sorted(self._folder.glob("*.parquet")):
            path = table.with_suffix(".arrow")
            if path.exists():
                try:
                    rows = read_table(table, _TABLE, advice=_ADVICE).to_pylist()
                    keys = [row.pop("key") for row in rows]
                except DamagedError:
                    _remove(path)
                else:
                    self._remember(CachedShard(path, keys, rows))

    def __contains__(self, key: str) -> bool:
        """Whether a clip is there."""
        return key in self._clips

    def clip(self, key: str) -> tuple[dict[str, Any], pa.RecordBatch] | None:
        """Look up one clip.

        Args:
            key: What it is made from.

        Returns:
            Its row of the index of the store that it was made for, and its record batch; or `None`, also where that
            is not what was written.
        """
        if key not in self._clips:
            return None
        shard, number = self._clips[key]
        try:
            return shard.rows[number], self._checked(shard).batch(shard.rows[number]["batch"])
        except FileNotFoundError:  # another run has removed it in the meantime
            return None
        except DamagedError as error:
            self._forget(shard, error)
            return None

    def shard(self, keys: Sequence[str], shard_bytes: int) -> CachedShard | None:
        """Find the shard that a store of these clips would begin with.

        Args:
            keys: What its clips are made from.
            shard_bytes: Size at which a shard is closed.

        Returns:
            The shard, all of it as it was written; `None` when there is none, or more of the clips would go into it.
        """
        candidates = self._by_first_key.get(keys[0], ()) if keys else ()
        # An interrupted run may have left the beginning of the shard that the next one finished.
        for found in sorted(candidates, key=lambda shard: len(shard.keys), reverse=True):
            if found.keys == list(keys[: len(found.keys)]) and self._is_sound(found):
                whole = len(found.keys) == len(keys) or self._size(found) >= shard_bytes
                return found if whole else None
        return None

    def keep(self, shard: Path, keys: Sequence[str], rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
        """Take in a finished shard.

        Args:
            shard: The Arrow file.
            keys: What its clips are made from.
            rows: Their rows of the index.
            schema: Schema of the index.
        """
        name = sha256("\n".join(keys).encode()).hexdigest()[:32]
        kept, table = self._folder / f"{name}.arrow", self._folder / f"{name}.parquet"
        partial = self._folder / f".{name}.{os.getpid()}.partial"
        self.link_or_copy(shard, partial)
        partial.replace(kept)
        keyed = pa.Table.from_pylist(list(rows), schema=schema).append_column("key", pa.array(keys, pa.string()))
        write_table(keyed, partial)
        self._batches.pop(kept, None)
        partial.replace(table)  # the shard counts from here on
        self._remember(CachedShard(kept, list(keys), list(rows)))

    def prune(self) -> None:
        """Remove the shards that no store holds: those that have no other hard link, where there are hard links."""
        for path in self._folder.glob("*.arrow") if self._links else ():
            if path.stat().st_nlink == 1:
                _remove(path)

    def link_or_copy(self, source: Path, target: Path) -> None:
        """Give a file a second name, or copy it where the file system knows no hard links.

        Args:
            source: Existing file.
            target: Its new name, which must not exist.
        """
        try:
            os.link(source, target)
            self._links = True
        except OSError:
            shutil.copyfile(source, target)

    def _checked(self, shard: CachedShard) -> CheckedBatches:
        """Open a shard; one without digests, of which nobody knows what was written, is as good as damaged."""
        if shard.path not in self._batches:
            batches = CheckedBatches(shard.path, _ADVICE)
            if not batches.have_digests or len(batches) != len(shard.rows):
                raise DamagedError(f"{shard.path} has no digests of its clips: {_ADVICE}")
            self._batches[shard.path] = batches
        return self._batches[shard.path]

    def _is_sound(self, shard: CachedShard) -> bool:
        if not shard.path.exists():  # another run has removed it in the meantime
            return False
        try:
            self._checked(shard).check()
        except DamagedError as error:
            self._forget(shard, error)
            return False
        return True

    def _size(self, shard: CachedShard) -> int:
        """Bytes of a shard's record batches, as the writer counts them."""
        return sum(batch.nbytes for batch in self._checked(shard).unchecked)

    def _forget(self, shard: CachedShard, error: DamagedError) -> None:
        logger.warning("%s", error)
        self._clips = {key: found for key, found in self._clips.items() if found[0] is not shard}
        self._by_first_key[shard.keys[0]] = [s for s in self._by_first_key[shard.keys[0]] if s is not shard]
        self._batches.pop(shard.path, None)
        _remove(shard.path)

    def _remember(self, shard: CachedShard) -> None:
        self._by_first_key.setdefault(shard.keys[0], []).append(shard)
        self._clips |= {key: (shard, number) for number, key in enumerate(shard.keys)}


def _remove(shard: Path) -> None:
    """Remove a shard from the cache, its table first: without it, it does not count."""
    shard.with_suffix(".parquet").unlink(missing_ok=True)
    shard.unlink(missing_ok=True)

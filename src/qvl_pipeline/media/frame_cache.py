"""Finished shards of frame stores, kept by what they were made from: no clip is decoded twice under the same rules."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


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

    So they take no space of their own; those that no store holds any more are removed by `prune`.
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
        self._links = False
        for table in sorted(self._folder.glob("*.parquet")):
            path = table.with_suffix(".arrow")
            if path.exists():
                rows = pq.ParquetFile(table).read().to_pylist()
                keys = [row.pop("key") for row in rows]
                self._remember(CachedShard(path, keys, rows))

    def __contains__(self, key: str) -> bool:
        """Whether a clip is there."""
        return key in self._clips

    def clip(self, key: str) -> tuple[dict[str, Any], pa.RecordBatch] | None:
        """Look up one clip.

        Args:
            key: What it is made from.

        Returns:
            Its row of the index of the store that it was made for, and its record batch; or `None`.
        """
        if key not in self._clips:
            return None
        shard, number = self._clips[key]
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(shard.path)))
        except FileNotFoundError:  # another run has removed it in the meantime
            return None
        return shard.rows[number], reader.get_batch(shard.rows[number]["batch"])

    def shard(self, keys: Sequence[str], shard_bytes: int) -> CachedShard | None:
        """Find the shard that a store of these clips would begin with.

        Args:
            keys: What its clips are made from.
            shard_bytes: Size at which a shard is closed.

        Returns:
            The shard; `None` when there is none, or when more of the clips would go into it.
        """
        candidates = self._by_first_key.get(keys[0], ()) if keys else ()
        # An interrupted run may have left the beginning of the shard that the next one finished.
        for found in sorted(candidates, key=lambda shard: len(shard.keys), reverse=True):
            if found.keys == list(keys[: len(found.keys)]) and found.path.exists():
                return found if len(found.keys) == len(keys) or _size(found.path) >= shard_bytes else None
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
        pq.write_table(keyed, partial)
        partial.replace(table)  # the shard counts from here on
        self._remember(CachedShard(kept, list(keys), list(rows)))

    def prune(self) -> None:
        """Remove the shards that no store holds: those that have no other hard link, where there are hard links."""
        for path in self._folder.glob("*.arrow") if self._links else ():
            if path.stat().st_nlink == 1:
                path.with_suffix(".parquet").unlink(missing_ok=True)
                path.unlink()

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

    def _remember(self, shard: CachedShard) -> None:
        self._by_first_key.setdefault(shard.keys[0], []).append(shard)
        self._clips |= {key: (shard, number) for number, key in enumerate(shard.keys)}


def _size(shard: Path) -> int:
    """Bytes of a shard's record batches, as the writer counts them."""
    reader = pa.ipc.open_file(pa.memory_map(str(shard)))
    return sum(reader.get_batch(number).nbytes for number in range(reader.num_record_batches))

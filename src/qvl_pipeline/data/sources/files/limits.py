"""How much of a file of rows may be in memory, and how much it may hold: a few bytes can stand for gigabytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Share of the memory that one row may take: as objects of Python it is 25 times as large, and for a while there twice.
_ROWS_IN_MEMORY = 50
_PIECE_BYTES = 1 << 20
# No data that says something is compressed by more: what is, and does not fit into memory either, is a bomb.
MOST_EXPANSION = 300
# How much of a file is read before all of it is judged by it.
_ENOUGH_TO_JUDGE = 1 << 26


@dataclass(frozen=True)
class Limits:
    """Limits of reading files.

    Attributes:
        memory_bytes: Memory that reading and all that follows keeps within.
        slab_bytes: Size from which on a slab is full.
    """

    memory_bytes: int
    slab_bytes: int

    @property
    def row_bytes(self) -> int:
        """Most bytes of a row."""
        return self.memory_bytes // _ROWS_IN_MEMORY

    @property
    def piece_bytes(self) -> int:
        """Bytes that are taken out of a file at once."""
        return max(min(_PIECE_BYTES, self.slab_bytes // 4), 1)

    def too_long(self, size: int | None = None) -> str:
        """Say that a row has so many bytes, or more than it may."""
        takes = "more" if size is None else f"{size / 2**20:,.0f} MiB, more"
        return f"it takes {takes} than the {self.row_bytes / 2**20:,.0f} MiB that data_engine.memory_limit_gib allows"

    def guard(self, path: Path) -> Guard:
        """Watch how much a file turns out to hold."""
        return Guard(path.stat().st_size, self.memory_bytes)


class Guard:
    """Refuses a file that holds much more than its size tells."""

    def __init__(self, file_bytes: int, memory_bytes: int) -> None:
        """Take the size of the file, and how much it may hold without being compared with that."""
        self._allowed = max(memory_bytes, MOST_EXPANSION * file_bytes)
        self._file_bytes = file_bytes
        self._total = 0

    def add(self, size: int, done: float) -> None:
        """Count what was read.

        Args:
            size: Bytes.
            done: Share of the file that is read with them.

        Raises:
            ValueError: The file holds, or if it goes on like this will hold, more than it may.
        """
        self._total += size
        whole = self._total / done if done and self._total > _ENOUGH_TO_JUDGE else self._total
        if max(self._total, whole) > self._allowed:
            raise ValueError(
                f"it is a decompression bomb: its {self._file_bytes:,} bytes hold about {whole / 2**30:,.1f} GiB, over "
                f"{MOST_EXPANSION} times as much and more than data_engine.memory_limit_gib"
            )

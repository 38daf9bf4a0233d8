"""Record batches of Arrow files with a digest of every column, which is checked when the column is first read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from qvl_pipeline.storage.digests import DamagedError, Piece, agrees, damaged, digest_of
from qvl_pipeline.storage.tables import damage_named

_KEY = "digest."
# `ARROW1` and two zeros; a stream follows, and an index of it.
_MAGIC_BYTES = 8


def write_checked(writer: pa.RecordBatchFileWriter, batch: pa.RecordBatch, number: int) -> None:
    """Write a batch with digests of its columns in its metadata.

    Args:
        writer: The file.
        batch: The batch.
        number: How many batches the file has already.
    """
    # In memory, a column may be part of a larger one, and have a bitmap without a null: in the file it has not.
    stored = pa.ipc.read_record_batch(batch.serialize(), batch.schema)
    digests = {f"{_KEY}{name}": digest_of(_pieces(stored, name, number)) for name in batch.schema.names}
    writer.write_batch(batch, custom_metadata=digests)


class Shards:
    """The Arrow files of a folder by their names, each mapped when it is first asked for."""

    def __init__(self, folder: Path, advice: str) -> None:
        """Map nothing yet.

        Args:
            folder: Where they are.
            advice: What to do when one is damaged or missing.
        """
        self._folder, self._advice = folder, advice
        self._mapped: dict[str, CheckedBatches] = {}

    def __getitem__(self, name: str) -> CheckedBatches:
        """Return the batches of a file.

        Raises:
            DamagedError: It is missing, or no whole Arrow file.
        """
        if name not in self._mapped:
            try:
                self._mapped[name] = CheckedBatches(self._folder / name, self._advice)
            except FileNotFoundError as error:
                raise DamagedError(f"{self._folder / name} is missing: {self._advice}") from error
        return self._mapped[name]


class CheckedBatches:
    """The batches of an Arrow file, memory-mapped. Checking a column costs reading it, once for an object.

    Batches that were written without digests are not checked.

    Attributes:
        unchecked: The batches as they are.
        have_digests: Whether every column of every batch has a digest.
    """

    def __init__(self, path: Path, advice: str = "") -> None:
        """Map the file.

        Args:
            path: Arrow IPC file.
            advice: What to do when it is damaged.

        Raises:
            DamagedError: It is no whole Arrow file.
            FileNotFoundError: It does not exist.
        """
        self._path, self._advice = path, advice
        with damage_named(path, advice):
            self.schema, found = _read_both_ways(path)
        self.unchecked = [batch for batch, _ in found]
        self._digests = [_digests(metadata) for _, metadata in found]
        self.have_digests = all(digests.keys() >= set(self.schema.names) for digests in self._digests)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.unchecked)

    def batch(self, number: int, names: Sequence[str] | None = None) -> pa.RecordBatch:
        """Return a batch of which some columns, or all, are what was written.

        Raises:
            DamagedError: One of them is not.
        """
        batch, digests = self.unchecked[number], self._digests[number]
        for name, recorded in [(name, digests[name]) for name in names or batch.schema.names if name in digests]:
            if not agrees(recorded, _pieces(batch, name, number)):
                raise damaged(self._path, f"batch {number}, column '{name}' is not what was written", self._advice)
            digests.pop(name, None)  # another thread may have
        return batch

    def check(self) -> None:
        """Check all there is.

        Raises:
            DamagedError: Something is not what was written.
        """
        for number in range(len(self)):
            self.batch(number)


def _read_both_ways(path: Path) -> tuple[pa.Schema, list[tuple[pa.RecordBatch, pa.KeyValueMetadata | None]]]:
    """Read a file from its start, where each batch follows the one before; its end must say the same of it.

    Raises:
        OSError: It is no whole Arrow file.
        ValueError: The same, or it says two things.
    """
    mapped = pa.memory_map(str(path))
    by_end = pa.ipc.open_file(mapped)
    mapped.seek(_MAGIC_BYTES)
    by_start = pa.ipc.open_stream(mapped)
    found = list(by_start.iter_batches_with_custom_metadata())
    for batch, _ in found:
        batch.validate()  # lengths fit each other: with some that do not, Arrow ends the process
    if len(found) != by_end.num_record_batches or not by_start.schema.equals(by_end.schema, check_metadata=True):
        raise ValueError("its start and its end contradict each other")
    return by_start.schema, found


def _digests(metadata: pa.KeyValueMetadata | None) -> dict[str, str]:
    texts = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in (metadata or {}).items()}
    return {key.removeprefix(_KEY): value for key, value in texts.items() if key.startswith(_KEY)}


def _pieces(batch: pa.RecordBatch, name: str, number: int) -> Iterator[Piece]:
    """Yield all that a column consists of, and where in the file it is."""
    yield f"{number} {name} {batch.num_rows}".encode()
    for buffer in batch.column(name).buffers():
        yield f" {-1 if buffer is None else buffer.size} ".encode()
        if buffer is not None:
            yield memoryview(buffer)

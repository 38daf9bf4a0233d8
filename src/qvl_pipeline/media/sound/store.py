"""The spectrograms of every sound that samples refer to, beside the frames of clips: written once, memory-mapped.

As of frames, a store may hold all of a sound but its spectrogram, which is then made whenever it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from qvl_pipeline.errors import UserError
from qvl_pipeline.families.hearing import Hearing
from qvl_pipeline.media.frames.store import AGAIN, SHARD_BYTES, clip_id
from qvl_pipeline.media.opening import open_media
from qvl_pipeline.storage.batches import Shards, write_checked
from qvl_pipeline.storage.tables import read_table, write_table

INDEX = "sounds.parquet"
INDEX_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("clip_id", "type", "path")]
    + [(name, pa.float64()) for name in ("start", "end")]
    + [("shard", pa.string()), ("batch", pa.int32()), ("spectra", pa.int32()), ("mel_bins", pa.int32())]
    + [("content_hash", pa.string())]
)


@dataclass(frozen=True)
class StoredSound:
    """A sound as the model hears it.

    Attributes:
        type: What it is used as: `audio`, or `video` for what is heard with a clip.
        path: Source file.
        start: First second that is used, or `None`.
        end: Last second that is used, or `None`.
        content_hash: Sha256 of the source file.
        spectra: Length of the spectrogram.
        log_mel: Float32 `[spectra, bins]`; `None` when it is to be made whenever it is read.
    """

    type: str
    path: str
    start: float | None
    end: float | None
    content_hash: str
    spectra: int
    log_mel: np.ndarray | None


class SoundStoreWriter:
    """Writes Arrow IPC shards with one record batch per sound, and `sounds.parquet` at the end."""

    def __init__(self, folder: Path, mel_bins: int, shard_bytes: int = SHARD_BYTES) -> None:
        """Start a store.

        Args:
            folder: Folder to write into, that of the frame store.
            mel_bins: Frequencies of a spectrogram.
            shard_bytes: A shard that has grown to this size is closed.
        """
        self._folder, self._bins, self._shard_bytes = folder, mel_bins, shard_bytes
        self._schema = pa.schema([("log_mel", pa.list_(pa.float32(), mel_bins))])
        self._rows: list[dict[str, Any]] = []
        self._writer: pa.RecordBatchFileWriter | None = None
        self._shards = self._batches = self._bytes = 0

    def __enter__(self) -> Self:
        """Enter the context, at whose end the store is complete."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the shard; write the index unless an error left the store incomplete."""
        self._close_shard()
        if error is None:
            write_table(pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA), self._folder / INDEX)

    def add(self, sound: StoredSound) -> None:
        """Append one sound."""
        row = {name: value for name, value in vars(sound).items() if name != "log_mel"}
        row |= {"clip_id": clip_id(sound.path, sound.start, sound.end), "mel_bins": self._bins}
        if sound.log_mel is not None:
            name = f"sounds-{self._shards:05d}.arrow"
            if self._writer is None:
                self._writer = pa.ipc.new_file(str(self._folder / name), self._schema)
            values = pa.FixedSizeListArray.from_arrays(pa.array(sound.log_mel.ravel()), self._bins)
            batch = pa.record_batch([values], schema=self._schema)
            write_checked(self._writer, batch, self._batches)
            row |= {"shard": name, "batch": self._batches}
            self._batches += 1
            self._bytes += batch.nbytes
        self._rows.append(row)
        if self._bytes >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._batches = self._bytes = 0
            self._shards += 1


class SoundStore:
    """Reads spectrograms. Shards are memory-mapped when first needed; objects can be pickled."""

    def __init__(self, folder: Path, hearing: Hearing) -> None:
        """Read the index; a frame store that was written for a model that does not hear has no sounds.

        Args:
            folder: Folder written by the `sample` stage.
            hearing: How the family hears: for spectrograms that are not stored.
        """
        self.folder, self._hearing = Path(folder), hearing
        path = self.folder / INDEX
        rows = read_table(path, INDEX_SCHEMA, advice=AGAIN).to_pylist() if path.exists() else []
        self._rows = {(row["type"], row["clip_id"]): row for row in rows}
        self._shards = Shards(self.folder, AGAIN)

    def __reduce__(self) -> tuple[type[SoundStore], tuple[Path, Hearing]]:
        """Pickle as the folder."""
        return SoundStore, (self.folder, self._hearing)

    def find(self, kind: str, clip: str) -> dict[str, Any] | None:
        """Look up the row of `sounds.parquet` of a sound, or of what is heard with a clip; `None` if there is none."""
        return self._rows.get((kind, clip))

    def info(self, kind: str, clip: str) -> dict[str, Any]:
        """Look up the row of `sounds.parquet` of a sound that must be there.

        Raises:
            UserError: It is not.
        """
        row = self.find(kind, clip)
        if row is None:
            raise UserError(f"{self.folder} holds no spectrogram of '{clip}': run the pipeline 'sample' again")
        return row

    def log_mel(self, kind: str, clip: str, part: slice = slice(None)) -> np.ndarray:
        """Read a spectrogram.

        Args:
            kind: `audio`, or `video` for what is heard with a clip.
            clip: Its id.
            part: Which of its spectra.

        Returns:
            Float32 `[spectra, bins]`, where it is stored a read-only view of the memory map.

        Raises:
            UserError: There is none; or it is not what was written (a `DamagedError`), or not stored, and the file
                cannot be decoded.
        """
        row = self.info(kind, clip)
        if row["shard"] is None:
            return _from_source(row, self._hearing)[part]
        values = self._shards[row["shard"]].batch(row["batch"], ["log_mel"]).column("log_mel").flatten()
        # Not by Arrow's `to_numpy`, which imports pandas where it is installed.
        floats = np.frombuffer(values.buffers()[1], dtype=np.float32)[values.offset : values.offset + len(values)]
        return floats.reshape(row["spectra"], row["mel_bins"])[part]

    def samples(self, kind: str, clip: str) -> np.ndarray:
        """Decode a sound: float32 `[samples]`, at the rate that the model hears at.

        Raises:
            UserError: There is none, or its file cannot be decoded.
        """
        return _samples(self.info(kind, clip), self._hearing)


def _from_source(row: dict[str, Any], hearing: Hearing) -> np.ndarray:
    from qvl_pipeline.media.sound.log_mel import log_mel

    return log_mel(_samples(row, hearing), hearing)


def _samples(row: dict[str, Any], hearing: Hearing) -> np.ndarray:
    from qvl_pipeline.media.sound.decoding import SoundError, read_sound  # needs PyAV, which stored spectrograms do not

    rate, longest = hearing.sampling_rate, hearing.longest_s
    try:
        with open_media(row["path"], content_hash=row["content_hash"]) as file:
            return read_sound(file, row["start"], row["end"], rate=rate, longest_s=longest)
    except (OSError, SoundError) as error:
        raise UserError(f"sound '{row['path']}' cannot be read ({error}); run the pipeline 'validate'") from error

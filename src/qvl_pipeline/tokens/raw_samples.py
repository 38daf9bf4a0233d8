"""The samples of a stream: rows of a Parquet file, tokenised when they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from qvl_pipeline.errors import UserError
from qvl_pipeline.families.hearing import Hearing
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.storage.tables import damage_named, open_table
from qvl_pipeline.tokens.encoding import COPIED, ImageFacts, MediaGrids, encode_samples
from qvl_pipeline.tokens.unusable import Unusable


class RawSamples:
    """The rows of a `stream_samples` file. No more than a few row groups of it are in memory."""

    def __init__(
        self,
        path: Path,
        processor: ProcessorMixin,
        frame_store: Path,
        hearing: Hearing | None = None,
        *,
        skip_bad_samples: bool,
        ignore_empty_think: bool = True,
    ) -> None:
        """Open the file.

        Args:
            path: File written by the `tokenize` stage.
            processor: The model's processor, with the image limits of the run.
            frame_store: Folder of the sampled clips and sounds.
            hearing: How the model hears; `None` does not.
            skip_bad_samples: Return an `Unusable` for a sample whose media are not there, too; otherwise that is an
                error.
            ignore_empty_think: Empty thoughts before answers are not trained on.
        """
        self._opened = path, processor, frame_store, hearing
        self._file = open_table(path, memory_map=True)
        self._processor, self._store = processor, FrameStore(frame_store)
        self._sounds = SoundStore(frame_store, hearing) if hearing else None
        self._skips, self._ignores_empty_think = skip_bad_samples, ignore_empty_think
        groups = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._starts = list(accumulate(groups, initial=0))
        self.num_shards = len(groups)
        # Lanes of a rank read the same row group at about the same time.
        self._shard = lru_cache(maxsize=4)(self._read)

    def __reduce__(self) -> tuple[partial[RawSamples], tuple[Path, ProcessorMixin, Path, Hearing | None]]:
        """Pickle as what it was opened with: the process aside opens the file anew."""
        options = {"skip_bad_samples": self._skips, "ignore_empty_think": self._ignores_empty_think}
        return partial(RawSamples, **options), self._opened

    def _read(self, number: int) -> list[dict[str, Any]]:
        # Without Arrow's threads: this runs in a forked process.
        with damage_named(self._opened[0], "run the pipeline 'tokenize' again"):
            table = self._file.read_row_group(number, columns=[*COPIED, "messages", "media"], use_threads=False)
        return table.to_pylist()

    def sources(self, shard: int) -> tuple[int, list[str]]:
        """Return the number of a row group's first row, and the source of each of its rows."""
        return self._starts[shard], [row["source"] for row in self._shard(shard)]

    def samples(self, rows: Sequence[int]) -> list[dict[str, Any] | Unusable]:
        """Tokenise rows.

        Args:
            rows: Row numbers.

        Returns:
            Rows of `tokenized_samples`, in the order of `rows`, as `TokenizedSamples.row` gives them; in the place of
            one that cannot be tokenised, the reason.

        Raises:
            UserError: The media of a sample are not there, and it may not be skipped.
        """
        raw = [self._row(row) for row in rows]
        media = [item for row in raw for item in row["media"] if item["height"] is not None]
        images = {m["path"]: ImageFacts(m["height"], m["width"], m["content_hash"]) for m in media}
        return list(self._encode(raw, MediaGrids(self._processor, images, self._store, self._sounds)))

    def _row(self, row: int) -> dict[str, Any]:
        shard = bisect_right(self._starts, row) - 1
        return self._shard(shard)[row - self._starts[shard]]

    def _encode(self, raw: Sequence[dict[str, Any]], grids: MediaGrids) -> Iterator[dict[str, Any] | Unusable]:
        try:
            encoded = encode_samples(raw, grids, self._processor, ignore_empty_think=self._ignores_empty_think)
        except UserError as error:
            if not self._skips:
                raise
            if len(raw) == 1:
                yield Unusable(raw[0]["sample_id"], "missing_media", str(error))
                return
            for row in raw:  # one of many has none; alone, it is found by name
                yield from self._encode([row], grids)
            return
        for sample in encoded:
            if isinstance(sample, Unusable):
                yield sample
            else:
                yield sample | {"label_spans": np.array(sample["label_spans"], dtype=np.int32).reshape(-1, 2)}

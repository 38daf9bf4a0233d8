"""A small stream on disk: raw samples with text, images and clips, and among them some that cannot be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from qvl_pipeline.data.plan.stream_samples import SCHEMA, write_stream_samples
from qvl_pipeline.data.plan.tokenization import SCHEMA as TOKENIZED
from qvl_pipeline.data.plan.tokenization import tokenize_samples
from qvl_pipeline.engine.model.loading import load_processor
from qvl_pipeline.engine.spec import TrainSpec
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.tokens.encoding import ImageFacts, MediaGrids
from qvl_pipeline.tokens.raw_samples import RawSamples
from tests.data.samples import samples_table
from tests.engine.training import changed, make_training

QUESTION, ANSWERS = "which digit is this?", ("seven", "this is seven", "seven seven seven")
OVERLONG = 5


class TokenizedFile:
    """The same stream, from a file of the samples as tokenised beforehand."""

    def __init__(self, path: Path, shard_rows: int) -> None:
        self._samples, self._rows = TokenizedSamples(path), shard_rows
        self.num_shards = -(-len(self._samples) // shard_rows)

    def sources(self, shard: int) -> tuple[int, list[str]]:
        start = shard * self._rows
        return start, self._samples.columns(["source"])["source"].to_pylist()[start : start + self._rows]

    def samples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [self._samples.row(row) for row in rows]


def make_streamed(folder: Path, model: Path, family: str, samples: int = 12) -> TrainSpec:
    """Write a stream, and `compared.arrow` with its tokens to compare it with; sample `OVERLONG` is too long."""
    kinds = ("text", "image", "video") * (samples // 3)
    base = make_training(folder, model, family, kinds=kinds, packs_per_step=2)
    table = samples_table([_row(folder, kind, number) for number, kind in enumerate(kinds)])
    side = 4 * FAMILIES[family].patch_size
    sizes = {str(folder / f"{number}.png"): ImageFacts(side, side, None) for number in range(len(kinds))}
    write_stream_samples(folder / "stream_samples.parquet", table, sizes)
    spec = changed(
        base,
        Path(base.run.output_dir),
        stream={"samples": str(folder / "stream_samples.parquet"), "max_steps": 4, "packing_length": 128},
        data={"pack_plan": "/nonexistent", "tokenized": "/nonexistent", "packing_length": 128},
    )
    _write_tokenized(folder / "compared.arrow", spec, table, sizes)
    return spec


def open_raw(spec: TrainSpec, *, skip_bad_samples: bool = False) -> RawSamples:
    return RawSamples(
        Path(spec.stream.samples), load_processor(spec), Path(spec.data.video_frames), skip_bad_samples=skip_bad_samples
    )


def _row(folder: Path, kind: str, number: int) -> dict[str, Any]:
    media = {"text": [], "image": [("image", str(folder / f"{number}.png"))], "video": [("video", f"{number}.mp4")]}
    question = QUESTION * (100 if number == OVERLONG else 1 + number % 3)
    turns = [("user", [*media[kind], question]), ("assistant", ANSWERS[number % len(ANSWERS)])]
    return {"kind": kind, "source": "ab"[number % 2], "messages": turns}


def _write_tokenized(path: Path, spec: TrainSpec, table: pd.DataFrame, images: dict[str, ImageFacts]) -> None:
    processor = load_processor(spec)
    grids = MediaGrids(processor, images, FrameStore(Path(spec.data.video_frames)))
    with pa.ipc.new_file(str(path), TOKENIZED) as writer:
        for batch, _ in tokenize_samples(table, grids, processor):
            writer.write_batch(batch)


def rewritten(path: Path, rows: list[dict[str, Any]], group: int) -> None:
    """Write rows of `stream_samples` in groups of another size."""
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=group)

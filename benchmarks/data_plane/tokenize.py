"""Samples a second that `tokenize` takes, against the transformers processor called for each of the same samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from transformers import ProcessorMixin

from benchmarks.data_plane import Row, Section
from qvl_pipeline.config import ModelConfig
from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.data.plan.tokenization import media_grids, tokenize_samples
from qvl_pipeline.media.frames.encoding import encode_frame
from qvl_pipeline.media.frames.store import FrameStore, FrameStoreWriter, StoredClip
from qvl_pipeline.pipelines.tokenize.nodes import prepare_base_model
from qvl_pipeline.tokens.encoding import MediaGrids, video_metadata

_ROWS_A_SAMPLE = 4000
_MODEL = ModelConfig(processor_type="qwen3_vl")
_FILES = 8
_WORDS = ["the", "digit", "in", "this", "picture", "is", "seven", "and", "that", "one", "a", "nine", "after", "it"]


def measure(rows: int) -> Section:
    """Tokenise samples of text, of an image of 640 x 480, and of 16 frames of 320 x 224; 1 for 4000 `rows` of each."""
    with TemporaryDirectory() as folder:
        images, media_index = _write_images(Path(folder))
        clips = _write_clips(Path(folder) / "frames")
        media = {"text": [None], "image": images, "clip": clips}
        samples = {case: _samples(rows // _ROWS_A_SAMPLE, files) for case, files in media.items()}
        prepare_base_model(pd.concat(samples.values()), _MODEL)(Path(folder) / "base")
        processor, store = load_processor(Path(folder) / "base", _MODEL), FrameStore(Path(folder) / "frames")
        grids = media_grids(processor, media_index, store)
        measured = {case: _measure(table, grids, processor, store) for case, table in samples.items()}
    ours, theirs = np.array(list(measured.values())).T
    counts = [len(table) for table in samples.values()]
    return Section(
        [Row(f"this project: {case}", *row) for case, *row in zip(samples, counts, ours.tolist(), strict=True)]
        + [Row(f"processor: {case}", *row) for case, *row in zip(samples, counts, theirs.tolist(), strict=True)],
        ratios={"over_processor": theirs.sum() / ours.sum()}
        | {f"{case}_over_processor": ratio for case, ratio in zip(samples, (theirs / ours).tolist(), strict=True)},
        targets={"over_processor": ">= 5"},
    )


def _write_images(folder: Path) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    rng = np.random.default_rng(0)
    paths = [str(folder / f"{number}.jpg") for number in range(_FILES)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
    return [{"type": "image", "path": path, "start": None, "end": None} for path in paths], pd.DataFrame(
        {"path": paths, "type": "image", "height": 480, "width": 640, "content_hash": None}
    )


def _write_clips(folder: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    paths = [f"{number}.mp4" for number in range(_FILES)]
    with FrameStoreWriter(folder) as store:
        for path in paths:
            frames = rng.integers(0, 256, (16, 3, 224, 320), dtype=np.uint8)
            encoded = [encode_frame(frame, "raw", jpeg_quality=95) for frame in frames]
            facts = {"path": path, "start": None, "end": None, "height": 224, "width": 320, "source_fps": 30.0}
            facts |= {"encoding": "raw", "frame_indices": list(range(0, 480, 30)), "seconds": list(range(16))}
            store.add(StoredClip(**facts, frames=encoded))
    return [{"type": "video", "path": path, "start": None, "end": None} for path in paths]


def _samples(count: int, files: Sequence[dict[str, Any] | None]) -> pd.DataFrame:
    """Conversations of two questions of 5 to 60 words, the first about a file, if any."""
    rng = np.random.default_rng(0)

    def say(role: str, *content: dict[str, Any]) -> dict[str, Any]:
        text = " ".join(rng.choice(_WORDS, rng.integers(5, 60)))
        return {"role": role, "content": [*content, {"type": "text", "text": text}]}

    rows = []
    for number in range(count):
        file = files[number % len(files)]
        about = [{"type": file["type"]}] if file else []
        turns = [say("user", *about), say("assistant"), say("user"), say("assistant")]
        rows.append(
            dict.fromkeys(("source", "kind", "task", "answer"), "")
            | {"sample_id": str(number), "split": "train", "messages": orjson.dumps(turns).decode()}
            | {"media": [file] if file else []}
        )
    return pd.DataFrame(rows)


def _measure(
    samples: pd.DataFrame, grids: MediaGrids, processor: ProcessorMixin, store: FrameStore
) -> tuple[float, float]:
    """Seconds that each of the two takes, after a first sample; they must find the same tokens."""
    list(tokenize_samples(samples.head(1), grids, processor))
    started = time.perf_counter()
    batches = [batch.rows for batch in tokenize_samples(samples, grids, processor)]
    ours = time.perf_counter() - started
    found = pa.Table.from_batches(batches)["input_ids"].to_pylist()
    _by_processor(samples.iloc[0], processor, store)
    started = time.perf_counter()
    expected = [_by_processor(sample, processor, store) for _, sample in samples.iterrows()]
    theirs = time.perf_counter() - started
    if found != expected:
        raise RuntimeError("the processor finds other tokens")
    return ours, theirs


def _by_processor(sample: pd.Series, processor: ProcessorMixin, store: FrameStore) -> list[int]:
    images = [Image.open(item["path"]) for item in sample["media"] if item["type"] == "image"]
    clips = [item["path"] for item in sample["media"] if item["type"] == "video"]
    metadata = [video_metadata(store.info(clip)["seconds"]) for clip in clips]
    inputs = processor(
        text=[processor.apply_chat_template(orjson.loads(sample["messages"]))],
        images=images or None,
        videos=[torch.tensor(store.frames(clip)) for clip in clips] or None,
        videos_kwargs={"do_sample_frames": False, "do_resize": False, "video_metadata": metadata},
    )
    return inputs["input_ids"][0]

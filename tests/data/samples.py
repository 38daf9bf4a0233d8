"""Small tables in the form of the contracts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qvl_pipeline.media.frames.encoding import encode_frame
from qvl_pipeline.media.frames.store import FrameStoreWriter, StoredClip

# Texts of the tests, and enough blank lines for the tokenizer to learn them as one token.
CORPUS = [
    "Which digit is this?",
    "The assistant says: hello",
    "Compare the pictures.",
    *["one\n\ntwo\n\n\nthree"] * 500,
]

Part = str | tuple[str, str] | tuple[str, str, float | None, float | None]


def conversation(
    turns: Sequence[tuple[str, str | Sequence[Part]]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and media of turns like `("user", [("image", "a.png"), "Which digit?"])`."""
    messages, media = [], []
    for role, parts in turns:
        content = []
        for part in [parts] if isinstance(parts, str) else parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            kind, path, start, end = (*part, None, None)[:4]
            content.append({"type": kind})
            media.append({"type": kind, "path": path, "start": start, "end": end})
        messages.append({"role": role, "content": content})
    return messages, media


def as_file(table: pa.Table) -> pq.ParquetFile:
    """A table as the nodes get one that is too large for memory."""
    written = pa.BufferOutputStream()
    pq.write_table(table, written)
    return pq.ParquetFile(pa.BufferReader(written.getvalue()))


def samples_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A table `valid_samples`; each row gives its turns as `messages`, and what else differs from the default."""
    table = []
    for number, row in enumerate(rows):
        messages, media = conversation(row["messages"])
        table.append(
            {
                "sample_id": f"source/{number}",
                "source": "source",
                "row": number,
                "split": "train",
                "kind": "text",
                "task": "exact_match",
                "answer": "7",
                "metadata": "{}",
                **row,
                "messages": json.dumps(messages),
                "media": media,
            }
        )
    return pd.DataFrame(table)


def write_images(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """Write images of noise of the given (height, width), and return their table `media_index`."""
    rng = np.random.default_rng(0)
    rows = []
    for name, (height, width) in sizes.items():
        path = folder / name
        Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)).save(path)
        content_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(
            {"path": str(path), "type": "image", "height": height, "width": width, "content_hash": content_hash}
        )
    return pd.DataFrame(rows)


def write_store(folder: Path, clips: Mapping[str, tuple[Sequence[int], float, tuple[int, int]]]) -> None:
    """Write a frame store of noise: of each clip the frame numbers, the source's rate, and (height, width)."""
    rng = np.random.default_rng(0)
    with FrameStoreWriter(folder) as writer:
        for path, (indices, fps, (height, width)) in clips.items():
            frames = rng.integers(0, 256, size=(len(indices), 3, height, width), dtype=np.uint8)
            writer.add(
                StoredClip(
                    path=path,
                    start=None,
                    end=None,
                    height=height,
                    width=width,
                    source_fps=fps,
                    encoding="png",
                    frame_indices=list(indices),
                    seconds=[index / fps for index in indices],
                    frames=[encode_frame(frame, "png", jpeg_quality=95) for frame in frames],
                )
            )

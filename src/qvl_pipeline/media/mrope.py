"""Multimodal rotary position ids (M-RoPE) of one sample, on the CPU, from token ids and media grids.

We compute them ourselves because transformers' own answer depends on its version: 5.3.0 and 5.4.0-5.5.3 misplace
images and videos in time (huggingface/transformers#45381, #45325), and later releases let the text after a
Qwen2.5-VL video start inside the video's time span. The reference is the model authors' own code
(huggingface/transformers#35569 and `rope2d.py` of QwenLM): every block starts one past the largest position so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qvl_pipeline.families.family import MERGE_SIZE


def mrope_positions(
    input_ids: np.ndarray,
    media: Sequence[Mapping[str, Any]],
    *,
    placeholder_ids: tuple[int, int],
    tokens_per_second: float | None,
) -> np.ndarray:
    """Compute the positions of one sample.

    Args:
        input_ids: Token ids `[T]` with expanded media placeholders.
        media: Entries of `tokenized_samples.media` in reading order.
        placeholder_ids: Ids of `<|image_pad|>` and `<|video_pad|>`.
        tokens_per_second: Temporal positions per second of Qwen2.5-VL; `None` for Qwen3-VL, whose clips are one block
            per temporal patch, separated by timestamps in the text.

    Returns:
        Positions `[4, T]`, int64: the plain text position, then the temporal, height and width positions.

    Raises:
        ValueError: The placeholders in `input_ids` do not match `media`.
    """
    is_media = np.isin(input_ids, placeholder_ids)
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    blocks = _vision_blocks(media, tokens_per_second)
    start = next_position = 0
    for run_start, run_end in _runs(is_media):
        text = run_start - start
        positions[:, start:run_start] = np.arange(next_position, next_position + text)
        next_position += text
        start = run_start
        while start < run_end:
            block = next(blocks, None)
            if block is None or start + block.shape[1] > run_end:
                raise ValueError(f"placeholders {run_start}..{run_end} do not fit the sizes of the sample's media")
            end = start + block.shape[1]
            positions[:, start:end] = block + next_position
            next_position = int(positions[:, start:end].max()) + 1
            start = end
    if next(blocks, None) is not None:
        raise ValueError(f"the sample has {len(media)} media but fewer placeholders")
    positions[:, start:] = np.arange(next_position, next_position + len(input_ids) - start)
    return np.concatenate([np.arange(len(input_ids))[None], positions])


def _vision_blocks(media: Sequence[Mapping[str, Any]], tokens_per_second: float | None) -> Iterator[np.ndarray]:
    """Yield the relative (t, h, w) positions `[3, tokens]` of each contiguous block of placeholders."""
    for item in media:
        frames, height, width = item["grid_t"], item["grid_h"] // MERGE_SIZE, item["grid_w"] // MERGE_SIZE
        if item["type"] == "video" and tokens_per_second is None:
            yield from [_grid(np.zeros(1, dtype=np.int64), height, width)] * frames
            continue
        interval = item["seconds_per_grid"] * tokens_per_second if item["type"] == "video" else 1.0
        # float32, then truncation after the product, as upstream: 0.5 s apart at 2 tokens/s is 0, 1, 2, …
        times = (np.arange(frames, dtype=np.float32) * np.float32(interval)).astype(np.int64)
        yield _grid(times, height, width)


def _grid(times: np.ndarray, height: int, width: int) -> np.ndarray:
    t, h, w = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
    return np.stack([t, h, w]).reshape(3, -1)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

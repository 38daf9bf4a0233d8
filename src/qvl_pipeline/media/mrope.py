"""Multimodal rotary position ids (M-RoPE) of one sample, on the CPU, from token ids and media grids.

We compute them ourselves because transformers' own answer depends on its version: 5.3.0 and 5.4.0-5.5.3 misplace
images and videos in time (huggingface/transformers#45381, #45325), and later releases let the text after a
Qwen2.5-VL video start inside the video's time span. The reference is the model authors' own code
(huggingface/transformers#35569 and `rope2d.py` of QwenLM): every block starts one past the largest position so far.
Sound counts up like text. Where a clip is heard too (Qwen2.5-Omni), both begin at one position, and take turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qvl_pipeline.families.family import MERGE_SIZE
from qvl_pipeline.families.hearing import audio_tokens


def mrope_positions(
    input_ids: np.ndarray,
    media: Sequence[Mapping[str, Any]],
    *,
    placeholder_ids: tuple[int, ...],
    tokens_per_second: float | None,
) -> np.ndarray:
    """Compute the positions of one sample.

    Args:
        input_ids: Token ids `[T]` with expanded media placeholders.
        media: Entries of `tokenized_samples.media` in reading order.
        placeholder_ids: Ids of the tokens that stand for images and videos and, where the model hears, for sounds.
        tokens_per_second: Temporal positions per second of Qwen2.5-VL; `None` for Qwen3-VL, whose clips are one block
            per temporal patch, separated by timestamps in the text.

    Returns:
        Positions `[4, T]`, int64: the plain text position, then the temporal, height and width positions.

    Raises:
        ValueError: The placeholders in `input_ids` do not match `media`.
    """
    sounds = placeholder_ids[2:]
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    blocks = _blocks(media, tokens_per_second, hears=bool(sounds))
    start = next_position = 0
    closes = False
    for run_start, run_end in _runs(np.isin(input_ids, placeholder_ids)):
        while start < run_end:
            block = next(blocks, None)
            end = max(start, run_start) + (0 if block is None else block.length)
            if block is None or end > run_end:
                raise ValueError(f"placeholders {run_start}..{run_end} do not fit the sizes of the sample's media")
            if start < run_start:
                text = _text(run_start - start, opens=block.interleaved, closes=closes)
                positions[:, start:run_start] = next_position + text
                start, next_position = run_start, next_position + int(text[-1]) + 1
            placed, last = block.placed(np.isin(input_ids[start:end], sounds))
            positions[:, start:end] = next_position + placed
            start, next_position, closes = end, next_position + last + 1, block.interleaved
    if next(blocks, None) is not None:
        raise ValueError(f"the sample has {len(media)} media but fewer placeholders")
    positions[:, start:] = next_position + _text(len(input_ids) - start, opens=False, closes=closes)
    return np.concatenate([np.arange(len(input_ids))[None], positions])


class _Block(NamedTuple):
    """Placeholders that follow one another and begin at one position.

    Attributes:
        seen: Relative (t, h, w) positions `[3, tokens]` of pictures.
        heard: Tokens of sound, each a position further than the one before in all three.
    """

    seen: np.ndarray
    heard: int = 0

    @property
    def length(self) -> int:
        """Tokens."""
        return self.seen.shape[1] + self.heard

    @property
    def interleaved(self) -> bool:
        """Whether a clip is seen and heard."""
        return self.heard > 0 and self.seen.shape[1] > 0

    def placed(self, is_sound: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the relative positions, given which of the tokens are sound, and the one that the text goes on after.

        That is, as the model's authors have it, the largest of the last stretch of pictures or of sound alone.
        """
        if is_sound.sum() != self.heard:
            raise ValueError(f"{int(is_sound.sum())} placeholders of sound do not fit its {self.heard} tokens")
        placed = np.empty((3, self.length), dtype=np.int64)
        placed[:, ~is_sound] = self.seen
        placed[:, is_sound] = np.arange(self.heard)
        last_stretch = np.flatnonzero(np.diff(is_sound))[-1:] + 1
        return placed, int(placed[:, last_stretch[0] if len(last_stretch) else 0 :].max())


def _text(count: int, *, opens: bool, closes: bool) -> np.ndarray:
    """Relative positions `[count]` of text.

    Args:
        count: Tokens.
        opens: A clip that is heard follows: the two tokens that open it, as a clip and as a sound, are at one position.
        closes: It is behind such a clip, whose two closing tokens are at one position.
    """
    steps = np.arange(count)
    if closes:
        steps = np.maximum(steps - 1, 0)
    if opens:
        steps[-1:] -= 1
    return steps


def _blocks(media: Sequence[Mapping[str, Any]], tokens_per_second: float | None, *, hears: bool) -> Iterator[_Block]:
    """Yield the blocks of placeholders, in order."""
    for item in media:
        frames, height, width = item["grid_t"], item["grid_h"] // MERGE_SIZE, item["grid_w"] // MERGE_SIZE
        heard = audio_tokens(item["spectra"]) if item.get("spectra") else 0
        if item["type"] == "video" and tokens_per_second is None:
            yield from [_Block(_grid(np.zeros(1, dtype=np.int64), height, width))] * frames
            continue
        times = np.arange(frames, dtype=np.float32)
        # float32, then truncation after the product, as upstream: 0.5 s apart at 2 tokens/s is 0, 1, 2, …
        if item["type"] == "video" and hears:
            times = times * np.float32(item["seconds_per_grid"]) * np.float32(tokens_per_second)
        elif item["type"] == "video":
            times = times * np.float32(item["seconds_per_grid"] * tokens_per_second)
        yield _Block(_grid(times.astype(np.int64), height, width), heard)


def _grid(times: np.ndarray, height: int, width: int) -> np.ndarray:
    t, h, w = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
    return np.stack([t, h, w]).reshape(3, -1)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

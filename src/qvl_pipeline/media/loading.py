"""The patches of a sample: its images and stored clips, in reading order, ready for the vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvl_pipeline.errors import UserError
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.media.pixels import open_image, patchify, resize


class PatchLoader:
    """Turns the `media` entries of `tokenized_samples` into patches. Objects can be pickled."""

    def __init__(
        self, *, patch_size: int, temporal_patch_size: int = 2, merge_size: int = 2, frame_store: Path | None
    ) -> None:
        """Set up a loader.

        Args:
            patch_size: Side of a patch in pixels: 16 for Qwen3-VL, 14 for Qwen2.5-VL.
            temporal_patch_size: Frames in a patch.
            merge_size: Side of a merged token in patches.
            frame_store: Folder of the sampled clips; `None` when there are none.
        """
        self._layout = {"patch_size": patch_size, "temporal_patch_size": temporal_patch_size, "merge_size": merge_size}
        self._values = 3 * temporal_patch_size * patch_size**2
        self._store = None if frame_store is None else FrameStore(frame_store)

    def load(self, media: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Load the patches of one sample.

        Args:
            media: Entries with `type`, `key` and the grid `grid_t`, `grid_h`, `grid_w` in patches, in reading order. Of
                a clip with the key `part`, a range of temporal patches, only these are loaded.

        Returns:
            Uint8 `[sum of patches, 3 * temporal_patch_size * patch_size**2]`: what transformers' processors return as
            `pixel_values` and `pixel_values_videos` before normalisation.

        Raises:
            UserError: A medium is missing, cannot be read, or is not of the size that was planned.
        """
        counts = [(end - start) * item["grid_h"] * item["grid_w"] for item in media for start, end in [_part(item)]]
        patches = np.empty((sum(counts), self._values), dtype=np.uint8)
        start = 0
        for item, count in zip(media, counts, strict=True):
            patchify(self._frames(item), patches[start : start + count], **self._layout)
            start += count
        return torch.from_numpy(patches)

    def _frames(self, item: Mapping[str, Any]) -> np.ndarray:
        """Frames `[T, 3, H, W]` of one medium, of exactly the planned size."""
        height, width = (item[side] * self._layout["patch_size"] for side in ("grid_h", "grid_w"))
        if item["type"] == "image":
            try:
                return resize(open_image(Path(item["key"]), item.get("content_hash")), height, width)[None]
            except OSError as error:
                raise UserError(
                    f"image '{item['key']}' cannot be read ({error}); run the pipeline 'validate'"
                ) from error
        if self._store is None:
            raise UserError(f"'{item['key']}' is a clip, but no frame store was given: run the pipeline 'sample'")
        size = self._layout["temporal_patch_size"]
        start, end = _part(item)
        frames = self._store.frames(item["key"], slice(start * size, end * size))
        planned = (item["grid_t"], height, width)
        stored = (-(-self._store.info(item["key"])["n_frames"] // size), *frames.shape[2:])
        if stored != planned:
            raise UserError(
                f"clip '{item['key']}' has (temporal patches, height, width) {stored} in the frame store, but {planned}"
                " was planned: run the pipeline 'tokenize' again"
            )
        return frames


def _part(item: Mapping[str, Any]) -> tuple[int, int]:
    """Temporal patches to load of a medium: all, unless ranks share it."""
    return item.get("part") or (0, item["grid_t"])

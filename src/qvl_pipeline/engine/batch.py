"""Packs as tensors: samples laid end to end in one row, with nothing padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qvl_pipeline.media.mrope import mrope_positions

if TYPE_CHECKING:
    from qvl_pipeline.media.loading import PatchLoader


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: `[1, T]`.
        position_ids: `[4, 1, T]`: text position within the sample, then M-RoPE's t, h, w.
        cu_seqlens: Bounds of the samples in the row, `[samples + 1]`, int32.
        max_length: Tokens of the longest sample.
        visual_mask: True at media placeholders, `[1, T]`.
        visual_tokens: Number of media placeholders.
        patches: Pixels of all media, uint8 `[N, C*T*P*P]`; `None` when no rank has media in this micro-batch.
        grid_thw: Patches of each medium over time, height and width, `[M, 3]`.
        target_index: Positions whose next token is trained on, `[S]`.
        targets: Those next tokens, `[S]`.
        target_source: Number of the source each target comes from, `[S]`.
        sample_ids: The samples, in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    visual_mask: torch.Tensor
    visual_tokens: int
    patches: torch.Tensor | None
    grid_thw: torch.Tensor | None
    target_index: torch.Tensor
    targets: torch.Tensor
    target_source: torch.Tensor
    sample_ids: list[str]

    def map_tensors(self, function: Any) -> Batch:
        """Return a batch with `function` applied to each tensor."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: function(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()})

    def pin_memory(self) -> Batch:
        """Pin the tensors; called by the data loader."""
        return self.map_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to a device, without waiting for it."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class BatchBuilder:
    """Builds batches from rows of `tokenized_samples`.

    Attributes:
        loader: Reads the pixels.
        patch_values: Values of one patch, `C * T * P * P`.
        placeholder_ids: Ids of `<|image_pad|>` and `<|video_pad|>`.
        tokens_per_second: Temporal M-RoPE positions per second, where the family has them.
        sources: Names of the sources, in the order of `target_source`.
    """

    loader: PatchLoader
    patch_values: int
    placeholder_ids: tuple[int, int]
    tokens_per_second: float | None
    sources: tuple[str, ...]

    def build(self, samples: Sequence[dict[str, Any]], *, vision: bool) -> Batch:
        """Lay samples end to end.

        Args:
            samples: Rows of `tokenized_samples`; none at all makes a batch that trains on nothing.
            vision: Some rank has media in this micro-batch, so this one must call its vision tower as well.

        Returns:
            The batch. Targets are shifted within each sample, so no sample predicts the start of the next.
        """
        if not samples:
            samples = [_NOTHING]
        lengths = [len(sample["input_ids"]) for sample in samples]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.concatenate([sample["input_ids"] for sample in samples]).astype(np.int64)
        targets = [
            _target_index(sample["label_spans"]) + start for sample, start in zip(samples, bounds[:-1], strict=True)
        ]
        target_index = np.concatenate(targets)
        numbers = [self.sources.index(sample["source"]) if len(sample["label_spans"]) else 0 for sample in samples]
        visual_mask = np.isin(ids, self.placeholder_ids)
        patches, grid = self._pixels([item for sample in samples for item in sample["media"]], vision)
        return Batch(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(np.concatenate([self._positions(s) for s in samples], axis=1))[:, None],
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_length=max(lengths),
            visual_mask=torch.from_numpy(visual_mask)[None],
            visual_tokens=int(visual_mask.sum()),
            patches=patches,
            grid_thw=grid,
            target_index=torch.from_numpy(target_index),
            targets=torch.from_numpy(ids[target_index + 1]),
            target_source=torch.from_numpy(np.repeat(numbers, [len(t) for t in targets])),
            sample_ids=[sample["sample_id"] for sample in samples],
        )

    def _positions(self, sample: dict[str, Any]) -> np.ndarray:
        try:
            return mrope_positions(
                sample["input_ids"],
                sample["media"],
                placeholder_ids=self.placeholder_ids,
                tokens_per_second=self.tokens_per_second,
            )
        except ValueError as error:
            raise ValueError(f"sample '{sample['sample_id']}': {error}") from error

    def _pixels(self, media: list[dict[str, Any]], vision: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if media:
            grid = [[item["grid_t"], item["grid_h"], item["grid_w"]] for item in media]
            return self.loader.load(media), torch.tensor(grid)
        if not vision:
            return None, None
        # The smallest image there is: patches are merged two by two.
        return torch.zeros(4, self.patch_values, dtype=torch.uint8), torch.tensor([[1, 2, 2]])


_NOTHING: dict[str, Any] = {
    "input_ids": np.zeros(1, dtype=np.int32),
    "label_spans": np.zeros((0, 2), dtype=np.int32),
    "media": [],
    "source": None,
    "sample_id": "<empty>",
}


def _target_index(spans: np.ndarray) -> np.ndarray:
    """Positions that predict a token of the spans `[S, 2]`: each one before its token."""
    ranges = [np.arange(start, end) - 1 for start, end in spans.tolist()]
    return np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)

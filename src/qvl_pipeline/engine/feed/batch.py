"""Packs as tensors: samples laid end to end in one row, with nothing padded; or, for comparison, a padded row each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qvl_pipeline.engine.feed.handing_over import mapped, packed, unpacked
from qvl_pipeline.engine.parallel.sequence_parallel import (
    SequenceShare,
    feature_routes,
    heard_tokens,
    split_media,
    temporal_patches,
    visual_tokens,
)
from qvl_pipeline.errors import UserError
from qvl_pipeline.media.mrope import mrope_positions

if TYPE_CHECKING:
    from qvl_pipeline.engine.feed.sounds import SoundReader
    from qvl_pipeline.media.loading import PatchLoader

# Most bytes of pixels that a loader process prepares at a time; a picture, or a pair of frames, may have more.
PIECE_BYTES = 1 << 27


@dataclass(frozen=True)
class BadSample:
    """A sample whose media could not be loaded; `supervised_tokens` are those that the plan counts for it."""

    sample_id: str
    supervised_tokens: int
    reason: str


@dataclass
class Batch:
    """One micro-batch of one rank: `B` rows of `T` tokens.

    A pack is one row of all its samples, or this rank's share of that row under sequence parallelism. Padded rows hold
    one sample each.

    Attributes:
        input_ids: `[B, T]`.
        position_ids: M-RoPE's t, h, w of each token, `[3, B, T]`. Text positions are left out: they would only make the
            language model look for the bounds of the samples, which it is given.
        attention_mask: True where there is a token, `[B, T]`; `None` for packs, which have no padding.
        real_tokens: True where there is a token of a sample, of the whole rows or of this rank's share, `[B, T]`.
        cu_seqlens: Bounds of the samples in the whole pack, `[samples + 1]`, int32; `None` for padded rows.
        lengths: Tokens of each sample.
        max_length: Tokens of the longest sample, or of the padding behind the last.
        visual_index: Positions of the placeholders of images and clips in the flattened rows, `[V]`.
        features_to: Features that this rank's media make for each rank of its sequence-parallel group.
        features_from: Features that this rank's placeholders take from each.
        patches: Pixels of this rank's media, uint8 `[N, C*T*P*P]`; `None` when no rank has media in this micro-batch.
        grid_thw: Patches of each medium over time, height and width, `[M, 3]`; always in host memory.
        vision_inputs: What the vision tower would compute from the grid, and wait for the device to know.
        heard_index: Positions of the placeholders of sounds in the flattened rows, `[A]`.
        heard_to: Features that this rank's sounds make for each rank of its sequence-parallel group.
        heard_from: Features that this rank's placeholders of sounds take from each.
        sound_inputs: Inputs of the audio tower for this rank's sounds; none when no rank has a sound in this
            micro-batch.
        spectra: Spectra of each of these sounds.
        target_index: Positions in the flattened rows whose next token is trained on, `[S]`.
        targets: Those next tokens, `[S]`.
        target_source: Number of the source each target comes from, `[S]`.
        sample_ids: The samples, in order.
        skipped: Samples that should be in it but could not be loaded.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    real_tokens: torch.Tensor
    cu_seqlens: torch.Tensor | None
    lengths: list[int]
    max_length: int
    visual_index: torch.Tensor
    features_to: list[int]
    features_from: list[int]
    patches: torch.Tensor | None
    grid_thw: torch.Tensor | None
    vision_inputs: dict[str, Any]
    heard_index: torch.Tensor
    heard_to: list[int]
    heard_from: list[int]
    sound_inputs: dict[str, Any]
    spectra: list[int]
    target_index: torch.Tensor
    targets: torch.Tensor
    target_source: torch.Tensor
    sample_ids: list[str]
    skipped: tuple[BadSample, ...] = ()

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return a batch with `function` applied to each tensor."""
        return Batch(**mapped(self._values, function))

    @property
    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle tensors in host memory as two: the pixels, most of all bytes, and what the others make together."""
        if get_spawning_popen():  # for a process that starts: what is packed must be there until it has
            return Batch, tuple(self._values.values())
        return _received, (self.patches, *packed(self._values | {"patches": None}))

    def attention_inputs(self) -> dict[str, Any]:
        """Arguments of the language model that say which tokens attend to which."""
        if self.cu_seqlens is None:
            return {"attention_mask": self.attention_mask}
        bounds, longest = self.cu_seqlens, self.max_length
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

    def pin_memory(self) -> Batch:
        """Pin the tensors; called by the data loader."""
        return self.map_tensors(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to a device, without waiting for it; but for the grid, which only the host reads."""
        batch = self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        return dataclasses.replace(batch, grid_thw=self.grid_thw)


@dataclass(frozen=True)
class BatchBuilder:
    """Builds batches from rows of `tokenized_samples`.

    Attributes:
        loader: Reads the pixels.
        patch_values: Values of one patch, `C * T * P * P`.
        placeholder_ids: Ids of the tokens that stand for images and clips and, where the model hears, for sounds.
        tokens_per_second: Temporal M-RoPE positions per second, where the family has them.
        vision_inputs: From a grid `[M, 3]` to `Batch.vision_inputs`.
        sources: Names of the sources, in the order of `target_source`.
        sounds: Reads the sounds; `None` where the model does not hear.
        rmpad: Build packs; otherwise a padded row for each sample.
        share: What of a pack is this rank's; only packs can be shared.
    """

    loader: PatchLoader
    patch_values: int
    placeholder_ids: tuple[int, ...]
    tokens_per_second: float | None
    vision_inputs: Callable[[torch.Tensor], dict[str, Any]]
    sources: tuple[str, ...]
    sounds: SoundReader | None = None
    rmpad: bool = True
    share: SequenceShare = field(default_factory=SequenceShare)

    def build(self, samples: Sequence[dict[str, Any]], *, vision: bool, sound: bool = False, pieces: int = 1) -> Batch:
        """Turn samples into one micro-batch.

        Args:
            samples: Rows of `tokenized_samples`; none at all makes a batch that trains on nothing.
            vision: Some rank has images or clips in this micro-batch, so this one must call its vision tower as well.
            sound: Some rank has sounds in it; the same of the audio tower.
            pieces: Of the pixels, load only the first of so many pieces: `piece` loads the others.

        Returns:
            The batch, or this rank's share of it. Targets are shifted within each sample, before anything is cut: no
            sample predicts the start of the next, and the last token of a share is trained on too.
        """
        samples = samples or [_NOTHING]
        lengths = [len(sample["input_ids"]) for sample in samples]
        tokens = self._lay_out([self._token_columns(sample) for sample in samples])
        attention_mask, real = torch.from_numpy(tokens.pop("attention_mask")), tokens.pop("real")
        input_ids = tokens["input_ids"]
        starts = np.cumsum([0, *lengths[:-1]]) if self.rmpad else np.arange(len(samples)) * input_ids.shape[1]
        target_index = [_target_index(s["label_spans"]) + start for s, start in zip(samples, starts, strict=True)]
        numbers = [self.sources.index(s["source"]) if len(s["label_spans"]) else 0 for s in samples]
        target_source = np.repeat(numbers, [len(index) for index in target_index])
        target_index = np.concatenate(target_index)
        media = [item for sample in samples for item in sample["media"]]
        shares = split_media([item for item in media if item["grid_t"]], self.share.degree)
        visual_mask, heard_mask = tokens.pop("visual_mask"), tokens.pop("heard_mask")
        routes = feature_routes(visual_mask.ravel(), [visual_tokens(share) for share in shares])
        heard = self._sounds(media)
        heard_routes = feature_routes(heard_mask.ravel(), [heard_tokens(share) for share in heard])
        sound_inputs, spectra = {}, []
        if self.sounds and (sound or any(heard)):
            sound_inputs, spectra = self.sounds.inputs(heard[self.share.rank])
        patches, grid = self._pixels(shares[self.share.rank], vision or any(shares), pieces)
        mine = self.share.of(input_ids.shape[1])
        trained = np.ones(len(target_index), dtype=bool)
        if self.share.degree > 1:
            trained = (mine.start <= target_index) & (target_index < mine.stop)
        padding = self.share.padding(sum(lengths)) if self.rmpad else 0
        return Batch(
            **{name: torch.from_numpy(values[..., mine]) for name, values in tokens.items()},
            attention_mask=None if self.rmpad else attention_mask,
            real_tokens=torch.from_numpy(real[..., mine]),
            cu_seqlens=_bounds(lengths, padding) if self.rmpad else None,
            lengths=lengths,
            max_length=max(*lengths, padding),
            visual_index=torch.from_numpy(np.flatnonzero(visual_mask[..., mine])),
            features_to=routes[self.share.rank].tolist(),
            features_from=routes[:, self.share.rank].tolist(),
            patches=patches,
            grid_thw=grid,
            vision_inputs={} if grid is None else self.vision_inputs(grid),
            heard_index=torch.from_numpy(np.flatnonzero(heard_mask[..., mine])),
            heard_to=heard_routes[self.share.rank].tolist(),
            heard_from=heard_routes[:, self.share.rank].tolist(),
            sound_inputs=sound_inputs,
            spectra=spectra,
            target_index=torch.from_numpy(target_index[trained] - mine.start),
            targets=torch.from_numpy(input_ids.ravel()[target_index[trained] + 1]),
            target_source=torch.from_numpy(target_source[trained]),
            sample_ids=[sample["sample_id"] for sample in samples],
        )

    def _token_columns(self, sample: dict[str, Any]) -> dict[str, np.ndarray]:
        """What the model is told about each token: arrays whose last axis is the tokens, and whose 0 is padding."""
        ids = np.asarray(sample["input_ids"], dtype=np.int64)
        return {
            "input_ids": ids,
            "position_ids": self._positions(sample),
            "visual_mask": np.isin(ids, self.placeholder_ids[:2]),
            "heard_mask": np.isin(ids, self.placeholder_ids[2:]),
            "attention_mask": np.ones(len(ids), dtype=bool),
            "real": np.full(len(ids), sample is not _NOTHING),
        }

    def _lay_out(self, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Join the columns `[..., T]` of samples into rows `[..., B, T]`; what has to be longer is padded with 0."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        laid_out = {}
        for name in samples[0]:
            columns = [sample[name] for sample in samples]
            if self.rmpad:
                columns = [np.concatenate(columns, axis=-1)]
                length = sum(lengths) + self.share.padding(sum(lengths))
            else:
                length = max(lengths)
            laid_out[name] = np.stack([_padded(column, length) for column in columns], axis=-2)
        return laid_out

    def _positions(self, sample: dict[str, Any]) -> np.ndarray:
        try:
            _text, *positions = mrope_positions(
                sample["input_ids"],
                sample["media"],
                placeholder_ids=self.placeholder_ids,
                tokens_per_second=self.tokens_per_second,
            )
            return np.stack(positions)
        except ValueError as error:
            raise ValueError(f"sample '{sample['sample_id']}': {error}") from error

    def piece(self, samples: Sequence[dict[str, Any]], number: int, pieces: int) -> torch.Tensor:
        """Load a piece of the pixels of one micro-batch, which are all pieces one behind the other.

        Args:
            samples: Rows of `tokenized_samples`.
            number: Of the piece, from 0.
            pieces: How many there are, of about the same size.

        Returns:
            Uint8 `[N, C*T*P*P]`, of this rank's media only.
        """
        media = [item for sample in samples for item in sample["media"] if item["grid_t"]]
        mine = split_media(media, self.share.degree)[self.share.rank]
        return self.loader.load(split_media(mine, pieces)[number])

    def _pixels(
        self, media: list[dict[str, Any]], vision: bool, pieces: int = 1
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if media:
            grid = [[temporal_patches(item), item["grid_h"], item["grid_w"]] for item in media]
            return self.loader.load(split_media(media, pieces)[0]), torch.tensor(grid)
        if not vision:
            return None, None
        # The smallest image there is: patches are merged two by two.
        return torch.zeros(4, self.patch_values, dtype=torch.uint8), torch.tensor([[1, 2, 2]])

    def _sounds(self, media: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Share out the sounds."""
        if self.sounds:
            return self.sounds.shares(media, self.share.degree)
        if deaf := next((item for item in media if item.get("spectra")), None):
            raise UserError(f"'{deaf['key']}' is to be heard, and the model does not hear: run the pipeline 'sample'")
        return [[] for _ in range(self.share.degree)]

    def check_media(self, media: list[dict[str, Any]]) -> None:
        """Load the media of a sample, for nothing but the error that one of them raises."""
        self._pixels([item for item in media if item["grid_t"]], vision=False)
        for share in self._sounds(media):
            for item in share:
                self.sounds.log_mel(item)


def _received(patches: torch.Tensor | None, others: torch.Tensor, placed: dict[str, Any]) -> Batch:
    return Batch(**unpacked(others, placed) | {"patches": patches})


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


def _padded(column: np.ndarray, length: int) -> np.ndarray:
    """Append zeros to the last axis of `[..., T]` until it has `length` entries."""
    return np.pad(column, [(0, 0)] * (column.ndim - 1) + [(0, length - column.shape[-1])])


def _bounds(lengths: list[int], padding: int) -> torch.Tensor:
    """Bounds of sequences laid end to end; the padding is one of its own, which no token of the samples attends to."""
    return torch.tensor([0, *np.cumsum([*lengths, *([padding] if padding else [])])], dtype=torch.int32)

"""Tokenized samples as inputs of a transformers model: left-padded prompts for `generate`, whole samples for losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, ProcessorMixin

from qvl_pipeline.families import family_of
from qvl_pipeline.families.hearing import audio_tokens
from qvl_pipeline.media.arrow_rows import TokenizedSamples
from qvl_pipeline.media.loading import PatchLoader
from qvl_pipeline.media.mrope import mrope_positions
from qvl_pipeline.media.pixels import normalize_patches
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.tokens.encoding import placeholder_ids


@dataclass(frozen=True)
class PromptCollator:
    """Turns samples into the inputs of one `model.generate` call.

    Attributes:
        processor: Processor of the model: padding token, and mean and deviation of pixels.
        config: Configuration of the model: placeholder ids, and the speed of time in M-RoPE.
        loader: Loads the patches of images and clips.
        sounds: Reads the spectrograms of sounds; `None` where the model does not hear.
    """

    processor: ProcessorMixin
    config: PreTrainedConfig
    loader: PatchLoader
    sounds: SoundStore | None = None

    @classmethod
    def create(cls, processor: ProcessorMixin, config: PreTrainedConfig, video_frames: Path) -> PromptCollator:
        """Set up a collator for one model.

        Args:
            processor: Processor of the model.
            config: Configuration of the model.
            video_frames: Folder of the frame store, with the sounds.
        """
        vision = config.vision_config
        loader = PatchLoader(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            frame_store=video_frames,
        )
        hearing = family_of(config.model_type).hearing
        return cls(processor, config, loader, SoundStore(video_frames, hearing) if hearing else None)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate the prompts: the tokens before the last answer, and the media among them.

        Args:
            samples: Rows of `tokenized_samples`.

        Returns:
            `input_ids` and `attention_mask` `[B, T]`, padded on the left to the longest prompt, `position_ids`
            `[4, B, T]`, and where the batch has such media `pixel_values` `[patches, values]` with `image_grid_thw`
            `[images, 3]`, `pixel_values_videos` with `video_grid_thw`, and `input_features`
            `[sounds, bins, spectra]` with `feature_attention_mask`.
        """
        prompts = [sample["input_ids"][: sample["prompt_length"]] for sample in samples]
        return self._inputs(samples, prompts)

    def whole(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate samples with their answers: the same inputs as of prompts, with all tokens and all media."""
        return self._inputs(samples, [sample["input_ids"] for sample in samples])

    def _inputs(self, samples: Sequence[Mapping[str, Any]], prompts: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        media = [self._media_before_answer(sample, ids) for sample, ids in zip(samples, prompts, strict=True)]
        return self._text_inputs(prompts, media) | self._media_inputs([item for items in media for item in items])

    def _media_before_answer(self, sample: Mapping[str, Any], prompt: np.ndarray) -> list[Mapping[str, Any]]:
        """Leave out media of turns that come after the last answer."""
        placeholders = np.isin(prompt, placeholder_ids(self.config)).sum()
        merged = self.config.vision_config.spatial_merge_size**2
        ends = np.cumsum([_patches(item) // merged + _heard_tokens(item) for item in sample["media"]])
        return [item for item, end in zip(sample["media"], ends, strict=True) if end <= placeholders]

    def _text_inputs(
        self, prompts: Sequence[np.ndarray], media: Sequence[Sequence[Mapping[str, Any]]]
    ) -> dict[str, torch.Tensor]:
        shape = (len(prompts), max(len(ids) for ids in prompts))
        input_ids = np.full(shape, self.processor.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        position_ids = np.zeros((4, *shape), dtype=np.int64)
        for row, (ids, items) in enumerate(zip(prompts, media, strict=True)):
            input_ids[row, -len(ids) :] = ids
            attention_mask[row, -len(ids) :] = 1
            # Given, as those of `generate` differ from the trained ones after a Qwen2.5-VL clip: see `media.mrope`.
            position_ids[:, row, -len(ids) :] = mrope_positions(
                ids,
                items,
                placeholder_ids=placeholder_ids(self.config),
                tokens_per_second=family_of(self.config.model_type).tokens_per_second(self.config),
            )
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _media_inputs(self, media: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = {}
        for kind, pixels, grid, normaliser in (
            ("image", "pixel_values", "image_grid_thw", self.processor.image_processor),
            ("video", "pixel_values_videos", "video_grid_thw", self.processor.video_processor),
        ):
            items = [item for item in media if item["type"] == kind]
            if items:
                patches = self.loader.load(items)
                inputs[pixels] = normalize_patches(patches, normaliser.image_mean, normaliser.image_std)
                inputs[grid] = torch.tensor([[item["grid_t"], item["grid_h"], item["grid_w"]] for item in items])
        return inputs | self._sound_inputs([item for item in media if item.get("spectra")])

    def _sound_inputs(self, heard: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not heard:
            return {}
        longest = max(item["spectra"] for item in heard)
        features = torch.zeros(len(heard), self.config.audio_config.num_mel_bins, longest)
        mask = torch.zeros(len(heard), longest, dtype=torch.long)
        for row, item in enumerate(heard):
            log_mel = np.array(self.sounds.log_mel(item["type"], item["key"]).T)
            features[row, :, : item["spectra"]], mask[row, : item["spectra"]] = torch.from_numpy(log_mel), 1
        return {"input_features": features, "feature_attention_mask": mask}


def batches_by_length(
    samples: TokenizedSamples, rows: Sequence[int], batch_size: int, column: str
) -> Iterator[list[int]]:
    """Yield rows in batches of similar length, so that little is padded.

    Args:
        samples: The tokenized samples.
        rows: Rows of `samples`.
        batch_size: Rows in a batch; there may be fewer in the last.
        column: What their length is: `length`, or `prompt_length`.
    """
    lengths = samples.columns([column]).column(column).to_numpy()
    by_length = sorted(rows, key=lambda row: (lengths[row], row))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def _heard_tokens(item: Mapping[str, Any]) -> int:
    return audio_tokens(item["spectra"]) if item.get("spectra") else 0


def _patches(item: Mapping[str, Any]) -> int:
    return item["grid_t"] * item["grid_h"] * item["grid_w"]

"""Tiny models, samples with random pixels, and their packs, as plain functions: test ranks need them too."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from qvl_pipeline.engine.feed.batch import BatchBuilder
from qvl_pipeline.engine.feed.sounds import SoundReader
from qvl_pipeline.engine.model.attention.linear import use_packed_linear_attention
from qvl_pipeline.engine.model.attention.packed import use_packed_attention
from qvl_pipeline.engine.model.packed_vlm import PackedVLM
from qvl_pipeline.engine.model.patch_embedding import use_linear_patch_embedding
from qvl_pipeline.engine.parallel.sequence_parallel import SequenceShare
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.families.hearing import audio_tokens
from qvl_pipeline.tokens.encoding import placeholder_ids

MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


class RandomSounds:
    """Stands in for the store of sounds: a spectrogram is random, but always the same for its key, `name:spectra`."""

    def log_mel(self, kind: str, key: str, part: slice = slice(None)) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        return rng.normal(size=(int(key.rpartition(":")[2]), 128)).astype(np.float32)[part]


class RandomPatches:
    """Stands in for the patch loader: the pixels of a medium are random, but always the same for its key."""

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def load(self, media: Sequence[dict[str, Any]]) -> torch.Tensor:
        return torch.cat([self._one(item) for item in media])

    def _one(self, item: dict[str, Any]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(item["key"].encode()))
        patches = item["grid_t"] * item["grid_h"] * item["grid_w"]
        pixels = torch.randint(0, 256, (patches, 3 * 2 * self.patch_size**2), generator=generator, dtype=torch.uint8)
        start, end = item.get("part", (0, item["grid_t"]))
        return pixels.unflatten(0, (item["grid_t"], -1))[start:end].flatten(0, 1)


def load_packed(
    folder: Path, family: str, *, rmpad: bool = True, sp_group: dist.ProcessGroup | None = None
) -> PackedVLM:
    hf, cpu = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), torch.device("cpu")
    use_packed_attention(hf, "auto", "auto", cpu, rmpad=rmpad, sp_group=sp_group)
    if FAMILIES[family].linear_attention:
        use_packed_linear_attention(hf, FAMILIES[family], "auto", cpu, sp_group=sp_group)
    use_linear_patch_embedding(hf)
    return PackedVLM(hf, FAMILIES[family], MEAN, STD, sp_group)


def make_builder(config: Any, family: str, *, rmpad: bool = True, share: SequenceShare | None = None) -> BatchBuilder:
    hearing = FAMILIES[family].hearing
    return BatchBuilder(
        loader=RandomPatches(config.vision_config.patch_size),
        patch_values=3 * 2 * config.vision_config.patch_size**2,
        placeholder_ids=placeholder_ids(config),
        tokens_per_second=FAMILIES[family].tokens_per_second(config),
        vision_inputs=partial(FAMILIES[family].vision_inputs, config.vision_config),
        sources=("a", "b"),
        sounds=SoundReader(RandomSounds(), hearing, config) if hearing else None,
        rmpad=rmpad,
        share=share or SequenceShare(),
    )


def make_samples(config: Any, family: str) -> dict[str, dict[str, Any]]:
    """Make one sample of every modality; sizes differ, and the longest answer is not the last."""
    image, video = config.image_token_id, config.video_token_id
    start, end = config.vision_start_token_id, config.vision_end_token_id
    # With times in the text there is a block of placeholders for each temporal patch; Qwen2.5-VL has one for the clip.
    frames = [start, *[video] * 6, end]
    clip = [30, *frames, 31, *frames] if family != "qwen2_5_vl" else [start, *[video] * 12, end]
    small, large = (1, 4, 4), (1, 4, 8)
    prompts: dict[str, tuple[list[int], list[tuple]]] = {
        "text": ([40, 41, 42], []),
        "image": ([start, *[image] * 4, end, 43], [("image", *small)]),
        "two_images": (
            [start, *[image] * 4, end, 44, start, *[image] * 8, end],
            [("image", *small), ("image", *large)],
        ),
        "video": ([*clip, 45], [("video", 2, 4, 6)]),
        "image_and_video": ([start, *[image] * 8, end, *clip], [("image", *large), ("video", 2, 4, 6)]),
    }
    if FAMILIES[family].hearing:
        prompts |= _heard_prompts(config)
    rng = np.random.default_rng(0)
    return {
        kind: _sample(kind, prompt, media, rng.integers(50, 500, size=3 + number), "ab"[number % 2])
        for number, (kind, (prompt, media)) in enumerate(prompts.items())
    }


def _heard_prompts(config: Any) -> dict[str, tuple[list[int], list[tuple]]]:
    """Prompts with sounds of less than a chunk, of a chunk and a spectrum, and of several; and a clip that is heard."""
    image, video, audio = config.image_token_id, config.video_token_id, config.audio_token_id
    seen = config.vision_start_token_id, config.vision_end_token_id
    heard = config.audio_start_token_id, config.audio_end_token_id

    def sound(spectra: int) -> list[int]:
        return [heard[0], *[audio] * audio_tokens(spectra), heard[1]]

    picture = [seen[0], *[image] * 4, seen[1]]
    # Four temporal patches of two tokens, half a second apart. In two seconds are all of them, and 50 tokens of sound.
    both = [seen[0], heard[0], *[video] * 8, *[audio] * 50, *[audio] * (audio_tokens(209) - 50), heard[1], seen[1]]
    return {
        "audio": ([*sound(57), 46], [("audio", 57)]),
        "two_sounds": ([*sound(41), 47, *sound(203)], [("audio", 41), ("audio", 203)]),
        "audio_and_image": ([*picture, *sound(90), 48], [("image", 1, 4, 4), ("audio", 90)]),
        "heard_clip": ([49, *both, 50], [("video", 4, 2, 4, 209)]),
        "everything": (
            [*picture, 51, *both, *sound(30), 52],
            [("image", 1, 4, 4), ("video", 4, 2, 4, 209), ("audio", 30)],
        ),
    }


def _medium(key: str, kind: str, *sizes: int) -> dict[str, Any]:
    """Entry of the column `media`; sizes are the grid, of a sound and of a clip that is heard also the spectra."""
    grid, spectra = ((0, 0, 0), sizes[0]) if kind == "audio" else (sizes[:3], (*sizes, 0)[3])
    return {
        "type": kind,
        "key": f"{key}:{spectra}" if spectra else key,
        **dict(zip(("grid_t", "grid_h", "grid_w"), grid, strict=True)),
        "seconds_per_grid": 0.5 if kind == "video" else 0.0,
        "spectra": spectra,
    }


def _sample(kind: str, prompt: list[int], media: list[tuple], answer: np.ndarray, source: str) -> dict[str, Any]:
    return {
        "sample_id": kind,
        "source": source,
        "input_ids": np.array([*prompt, *answer, 60], dtype=np.int32),
        "label_spans": np.array([[len(prompt), len(prompt) + len(answer)]], dtype=np.int32),
        "media": [_medium(f"{kind}/{number}", *medium) for number, medium in enumerate(media)],
    }

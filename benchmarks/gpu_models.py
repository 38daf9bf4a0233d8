"""Models of Qwen-VL dimensions, and packs of skewed samples with images: what `benchmarks.gpu` runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen3_5Config, Qwen3VLConfig, Qwen3VLMoeConfig

from qvl_pipeline.engine.feed.batch import Batch, BatchBuilder
from qvl_pipeline.engine.feed.sounds import SoundReader
from qvl_pipeline.engine.parallel.sequence_parallel import heard_spectra
from qvl_pipeline.families import FAMILIES

IDS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
HEARD_IDS = {"image_token_index": 1, "video_token_index": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
HEARD_IDS |= {"audio_token_index": 5, "audio_start_token_id": 6, "audio_end_token_id": 7}
_TEXT = {"vocab_size": 151_936, "max_position_embeddings": 128_000, "bos_token_id": None, "eos_token_id": None}
ROPE3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
ROPE25 = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_TINY_ROPE25 = ROPE25 | {"mrope_section": [4, 6, 6]}
_VISION25 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
_VISION25 |= {"fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "tokens_per_second": 2}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    """Name the dimensions of a decoder."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads, kv_heads), strict=True))


# The dimensions of the models' own configs.
MODELS: dict[str, Any] = {
    "qwen3_vl_4b": Qwen3VLConfig(
        text_config=_TEXT | sizes(2560, 9728, 36, 32, 8) | {"head_dim": 128, "rope_parameters": ROPE3},
        vision_config={"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16}
        | {"out_hidden_size": 2560, "patch_size": 16}
        | {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304},
        tie_word_embeddings=True,
        **IDS,
    ),
    "qwen2_5_vl_3b": Qwen2_5_VLConfig(
        text_config=_TEXT | sizes(2048, 11008, 36, 16, 2) | {"rope_parameters": ROPE25},
        vision_config=_VISION25 | {"out_hidden_size": 2048},
        tie_word_embeddings=True,
        **IDS,
    ),
    "qwen2_5_vl_7b": Qwen2_5_VLConfig(
        text_config=_TEXT | sizes(3584, 18944, 28, 28, 4) | {"rope_parameters": ROPE25, "vocab_size": 152_064},
        vision_config=_VISION25 | {"out_hidden_size": 3584},
        tie_word_embeddings=False,
        **IDS,
    ),
}
TINY = {
    "tiny_qwen3_vl": Qwen3VLConfig(
        text_config=_TEXT | sizes(64, 128, 2, 4, 2) | {"head_dim": 128, "rope_parameters": ROPE3, "vocab_size": 512},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        | {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        tie_word_embeddings=True,
        **IDS,
    ),
    "tiny_qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=_TEXT | sizes(64, 128, 2, 2, 1) | {"rope_parameters": _TINY_ROPE25, "vocab_size": 512},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        tie_word_embeddings=True,
        **IDS,
    ),
}
# Of the speed table alone: the comparison of attention kernels has nothing to say of their layers.
TINY_LAYERS: dict[str, Any] = {
    "tiny_qwen3_5": Qwen3_5Config(
        text_config=_TEXT
        | sizes(64, 128, 2, 4, 2)
        | {"head_dim": 32, "vocab_size": 512, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16}
        | {"rope_parameters": ROPE3 | {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.5}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        | {"patch_size": 16, "num_position_embeddings": 64},
        tie_word_embeddings=True,
        **IDS,
    ),
    "tiny_qwen3_vl_moe": Qwen3VLMoeConfig(
        text_config=_TEXT
        | sizes(64, 128, 2, 4, 2)
        | {"head_dim": 128, "rope_parameters": ROPE3, "vocab_size": 512}
        | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        | {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        tie_word_embeddings=True,
        **IDS,
    ),
}


@dataclass
class RandomPatches:
    """Stands in for the patch loader: random pixels, made once."""

    values: int

    def load(self, media: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Make the patches `[N, values]` of some media."""
        patches = sum(item["grid_t"] * item["grid_h"] * item["grid_w"] for item in media)
        return torch.randint(0, 256, (patches, self.values), dtype=torch.uint8)


class RandomSounds(SoundReader):
    """Stands in for the reader of sounds: random spectrograms."""

    def log_mel(self, item: dict[str, Any]) -> torch.Tensor:
        """Make the spectrogram `[bins, spectra]` of a sound, or of this rank's part of it."""
        return torch.randn(self.hearing.mel_bins, heard_spectra(item))


def make_samples(config: Any, tokens: int) -> list[dict[str, Any]]:
    """Samples of skewed lengths, two in three with an image, that fill a pack."""
    rng = np.random.default_rng(0)
    samples, left = [], tokens
    while left > 64:
        text = int(min(left - 40, np.clip(rng.lognormal(5.5, 0.9), 16, tokens // 2)))
        side = 2 * int(min(rng.integers(2, 20), (left - text - 4) ** 0.5)) if len(samples) % 3 else 0
        samples.append(_sample(config, rng, text, side, len(samples)))
        left -= len(samples[-1]["input_ids"])
    return samples


def make_heard_samples(config: Any, tokens: int) -> list[dict[str, Any]]:
    """Samples that fill a pack, half of its tokens with sounds of up to eight seconds."""
    samples, left = make_samples(config, tokens // 2), tokens // 2
    while left > 64:
        heard = min(200, left - 32)
        sample = _sample(config, np.random.default_rng(0), 32, 0, len(samples))
        sound = {"type": "audio", "key": "", "grid_t": 0, "grid_h": 0, "grid_w": 0, "spectra": 4 * heard}
        ids = np.concatenate([np.full(heard, config.audio_token_id, np.int32), sample["input_ids"]])
        samples.append(sample | {"input_ids": ids, "label_spans": sample["label_spans"] + heard, "media": [sound]})
        left -= len(ids)
    return samples


def make_clip(config: Any, tokens: int) -> dict[str, Any]:
    """A sample that fills a pack with one clip, of up to 512 frames at one a second, and a text about it.

    All but Qwen2.5-VL have the seconds between the frames, which are pairs of frames here as in the models.
    """
    height, width = (14, 16) if tokens >= 4096 else (4, 4)
    placeholders = [2] * (height * width // 4)
    told = FAMILIES[config.model_type].tokens_per_second(config) is None
    pair = [9] * 6 + [3, *placeholders, 4] if told else placeholders
    text = max(tokens // 32, 32)
    pairs = min(256, (tokens - text - 2) // len(pair))
    rng = np.random.default_rng(0)
    clip = pair * pairs if told else [3, *placeholders * pairs, 4]
    ids = np.array([*clip, *rng.integers(10, 500, size=tokens - len(clip))], dtype=np.int32)
    medium = {"type": "video", "key": "", "grid_t": pairs, "grid_h": height, "grid_w": width, "seconds_per_grid": 2.0}
    return {
        "sample_id": "clip",
        "source": "benchmark",
        "input_ids": ids,
        "label_spans": np.array([[len(ids) - (tokens - len(clip)) // 2, len(ids)]], dtype=np.int32),
        "media": [medium],
    }


def make_batch(config: Any, samples: Sequence[dict[str, Any]], *, rmpad: bool = True) -> Batch:
    """Lay samples out as a pack, or as padded rows."""
    values, family = 3 * 2 * config.vision_config.patch_size**2, FAMILIES[config.model_type]
    builder = BatchBuilder(
        loader=RandomPatches(values),
        patch_values=values,
        placeholder_ids=(1, 2),
        tokens_per_second=family.tokens_per_second(config),
        vision_inputs=partial(family.vision_inputs, config.vision_config),
        sources=("benchmark",),
        rmpad=rmpad,
    )
    return builder.build(samples, vision=any(sample["media"] for sample in samples))


def _sample(config: Any, rng: np.random.Generator, text: int, side: int, number: int) -> dict[str, Any]:
    image = [3, *[1] * (side * side // 4), 4] if side else []
    ids = np.array([*image, *rng.integers(10, 500, size=text)], dtype=np.int32)
    medium = {"type": "image", "key": "", "grid_t": 1, "grid_h": side, "grid_w": side, "seconds_per_grid": 0.0}
    return {
        "sample_id": str(number),
        "source": "benchmark",
        "input_ids": ids,
        "label_spans": np.array([[len(ids) - text // 2, len(ids)]], dtype=np.int32),
        "media": [medium] if side else [],
    }

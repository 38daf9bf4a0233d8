"""Tiny Qwen-VL models of about two million parameters, with every mechanism of the real ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)

from qvl_pipeline.demo.tokenizer import VOCAB_SIZE, train_tokenizer
from qvl_pipeline.families import FAMILIES

HIDDEN_SIZE = 128
MAX_VIDEO_FRAMES = 16

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    # About 1/sqrt(hidden size). Qwen's 0.02 is meant for widths in the thousands; a narrow model starts slowly with it.
    "initializer_range": 0.08,
}
MERGE = 2  # neighbouring patches of a token, in each direction
VISION = {
    "depth": 4,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_heads": 4,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN_SIZE,
    "initializer_range": 0.08,
}
# Learned position table of 8 x 8, DeepStack features from two blocks, M-RoPE with interleaved axes.
QWEN3_VL = {
    "text_config": TEXT
    | {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
    "vision_config": VISION
    | {
        "patch_size": FAMILIES["qwen3_vl"].patch_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 2],
    },
}
# Windows of 28 pixels (2 x 2 patches) inside images of at least 56; only the blocks named see the whole image.
QWEN2_5_VL = {
    "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    "vision_config": VISION
    | {
        "patch_size": FAMILIES["qwen2_5_vl"].patch_size,
        "window_size": 28,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    },
}
# The thinker alone. Chunks of 40 spectra (0.4 s) in the audio tower, where the published model has 200.
QWEN2_5_OMNI = {
    "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    "vision_config": VISION
    | {"patch_size": FAMILIES["qwen2_5_omni"].patch_size, "window_size": 28, "fullatt_block_indexes": [1, 3]},
    "audio_config": {
        "num_mel_bins": FAMILIES["qwen2_5_omni"].hearing.mel_bins,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 192,
        "d_model": 96,
        "n_window": 20,
        "max_source_positions": 100,
        "output_dim": HIDDEN_SIZE,
        "initializer_range": 0.08,
    },
}


def build_tiny_model(folder: Path, *, family: str, seed: int, corpus: Iterable[str]) -> None:
    """Build an untrained model of one family and write it as a normal Hugging Face folder.

    The folder loads with plain `AutoProcessor.from_pretrained` and `AutoModelForImageTextToText.from_pretrained`. The
    same arguments give the same bytes, and the global random state is left as it was.

    Args:
        folder: Folder to write into; made when missing.
        family: `qwen3_vl`, `qwen2_5_vl` or `qwen2_5_omni`.
        seed: Seed of the weights.
        corpus: Texts the tokenizer is trained on.

    Raises:
        ValueError: `family` is none of these.
    """
    builders = {"qwen3_vl": _qwen3_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen2_5_omni": _qwen2_5_omni}
    if family not in builders:
        raise ValueError(f"family '{family}': there are tiny models of {', '.join(sorted(builders))} only")
    tokenizer = train_tokenizer(corpus, omni=family == "qwen2_5_omni")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, processor = builders[family](tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def write_tiny_config(folder: Path, family: str) -> None:
    """Write the `config.json` of a tiny model, for its names and sizes: the ids of special tokens are not its own.

    Args:
        folder: Folder to write into.
        family: `qwen3_vl`, `qwen2_5_vl` or `qwen2_5_omni`.
    """
    configs = {
        "qwen3_vl": (Qwen3VLConfig, QWEN3_VL),
        "qwen2_5_vl": (Qwen2_5_VLConfig, QWEN2_5_VL),
        "qwen2_5_omni": (Qwen2_5OmniThinkerConfig, QWEN2_5_OMNI),
    }
    config, settings = configs[family]
    config(**settings, tie_word_embeddings=True).save_pretrained(folder)


def _qwen3_vl(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    patch_size = QWEN3_VL["vision_config"]["patch_size"]
    unit = MERGE * patch_size  # pixels of one merged token's side
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=patch_size, size=_pixel_limits(unit), image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        # This processor limits the pixels of the whole clip, not of a frame.
        video_processor=Qwen3VLVideoProcessor(
            size=_pixel_limits(unit, frames=MAX_VIDEO_FRAMES),
            min_frames=2,
            max_frames=MAX_VIDEO_FRAMES,
            cap_pixels_per_frame=False,
        ),
        chat_template=tokenizer.chat_template,
    )
    config = Qwen3VLConfig(**QWEN3_VL, **_token_ids(tokenizer), tie_word_embeddings=True)
    return Qwen3VLForConditionalGeneration(config), processor


def _qwen2_5_vl(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    config = Qwen2_5_VLConfig(**QWEN2_5_VL, **_token_ids(tokenizer), tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config), _qwen2_5_vl_processor(tokenizer)


def _qwen2_5_vl_processor(tokenizer: Qwen2Tokenizer) -> ProcessorMixin:
    patch_size = QWEN2_5_VL["vision_config"]["patch_size"]
    unit = MERGE * patch_size
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch_size, size=_pixel_limits(unit)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(
            size=_pixel_limits(unit),
            min_frames=2,
            max_frames=MAX_VIDEO_FRAMES,
            do_sample_frames=True,
            fps=2,
            cap_pixels_per_frame=False,
        ),
        chat_template=tokenizer.chat_template,
    )


def _qwen2_5_omni(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    hearing = FAMILIES["qwen2_5_omni"].hearing
    seeing = _qwen2_5_vl_processor(tokenizer)
    processor = Qwen2_5OmniProcessor(
        image_processor=seeing.image_processor,
        video_processor=seeing.video_processor,
        feature_extractor=WhisperFeatureExtractor(
            feature_size=hearing.mel_bins,
            sampling_rate=hearing.sampling_rate,
            hop_length=hearing.hop_length,
            n_fft=hearing.n_fft,
            chunk_length=hearing.longest_s,
            return_attention_mask=True,
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    ids = {
        "image_token_index": tokenizer.image_token_id,
        "video_token_index": tokenizer.video_token_id,
        "audio_token_index": tokenizer.audio_token_id,
        "audio_start_token_id": tokenizer.audio_bos_token_id,
        "audio_end_token_id": tokenizer.audio_eos_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
    }
    config = Qwen2_5OmniThinkerConfig(**QWEN2_5_OMNI, **ids, tie_word_embeddings=True)
    return Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def _pixel_limits(unit: int, frames: int = 1) -> dict[str, int]:
    """Between 2 x 2 and 8 x 8 merged tokens of `unit` pixels a side, for each frame."""
    return {"shortest_edge": (2 * unit) ** 2, "longest_edge": (8 * unit) ** 2 * frames}


def _token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in zip(keys, names, strict=True)}

"""Tiny Qwen-VL models of about two million parameters, with every mechanism of the real ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Tokenizer,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)

from qvl_pipeline.demo.tokenizer import OMNI_TOKENS, VOCAB_SIZE, train_tokenizer
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
# Three layers of linear attention, then one of gated softmax attention with half-rotated heads; no DeepStack.
QWEN3_5 = {
    "text_config": TEXT
    | {
        "head_dim": 32,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    },
    "vision_config": VISION | {"patch_size": FAMILIES["qwen3_5"].patch_size, "num_position_embeddings": 64},
}


# Eight experts in each layer, two for each token; of Qwen3.5 also one for all.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
QWEN3_VL_MOE = QWEN3_VL | {"text_config": QWEN3_VL["text_config"] | EXPERTS}
QWEN3_5_MOE = QWEN3_5 | {
    "text_config": {name: value for name, value in QWEN3_5["text_config"].items() if name != "intermediate_size"}
    | EXPERTS
    | {"shared_expert_intermediate_size": 96}
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
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_vl": QWEN3_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_5": QWEN3_5,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen2_5_omni": QWEN2_5_OMNI,
}


def build_tiny_model(folder: Path, *, family: str, seed: int, corpus: Iterable[str]) -> None:
    """Build an untrained model of one family and write it as a normal Hugging Face folder.

    The folder loads with plain `AutoProcessor.from_pretrained` and `AutoModelForImageTextToText.from_pretrained`. The
    same arguments give the same bytes, and the global random state is left as it was.

    Args:
        folder: Folder to write into; made when missing.
        family: A key of `CONFIGS`.
        seed: Seed of the weights.
        corpus: Texts the tokenizer is trained on.

    Raises:
        ValueError: There is no tiny model of that family.
    """
    if family not in CONFIGS:
        raise ValueError(f"family '{family}': there are tiny models of {', '.join(sorted(CONFIGS))} only")
    omni = family == "qwen2_5_omni"
    tokenizer = train_tokenizer(
        corpus, Qwen3_5Tokenizer if FAMILIES[family].linear_attention else Qwen2Tokenizer, omni=omni
    )
    of_processor = {"qwen2_5_vl": _qwen2_5_vl_processor, "qwen2_5_omni": _qwen2_5_omni_processor}
    processor = of_processor.get(family, _qwen3_vl_processor)(tokenizer, family)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        ids = _omni_token_ids(tokenizer) if omni else _token_ids(tokenizer)
        model = AutoModelForImageTextToText.from_config(_config(family, **ids))
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d):
                # transformers draws these four weights a channel as if they were hundreds: little would pass them.
                module.reset_parameters()
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    # As published: transformers would write Qwen3.5's experts one by one, as no checkpoint on the hub has them.
    model.save_pretrained(folder, save_original_format=family != "qwen3_5_moe")


def write_tiny_config(folder: Path, family: str) -> None:
    """Write the `config.json` of a tiny model, for its names and sizes: the ids of special tokens are not its own.

    Args:
        folder: Folder to write into.
        family: A key of `CONFIGS`.
    """
    _config(family).save_pretrained(folder)


def _config(family: str, **token_ids: int) -> PreTrainedConfig:
    return AutoConfig.for_model(FAMILIES[family].module_type, **CONFIGS[family], **token_ids, tie_word_embeddings=True)


def _qwen3_vl_processor(tokenizer: PreTrainedTokenizerBase, family: str) -> ProcessorMixin:
    """Processor of Qwen3-VL, which Qwen3.5 has too."""
    patch_size = FAMILIES[family].patch_size
    unit = MERGE * patch_size  # pixels of one merged token's side
    return Qwen3VLProcessor(
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


def _qwen2_5_vl_processor(tokenizer: PreTrainedTokenizerBase, family: str) -> ProcessorMixin:
    patch_size = FAMILIES[family].patch_size
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


def _qwen2_5_omni_processor(tokenizer: PreTrainedTokenizerBase, family: str) -> ProcessorMixin:
    """Processor of Qwen2.5-VL, and Whisper's feature extractor."""
    hearing, seeing = FAMILIES[family].hearing, _qwen2_5_vl_processor(tokenizer, family)
    return Qwen2_5OmniProcessor(
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


def _pixel_limits(unit: int, frames: int = 1) -> dict[str, int]:
    """Between 2 x 2 and 8 x 8 merged tokens of `unit` pixels a side, for each frame."""
    return {"shortest_edge": (2 * unit) ** 2, "longest_edge": (8 * unit) ** 2 * frames}


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in zip(keys, names, strict=True)}


def _omni_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {
        **{f"{kind}_token_index": f"{kind}_token" for kind in ("image", "video", "audio")},
        "audio_start_token_id": "audio_bos_token",
        "audio_end_token_id": "audio_eos_token",
        "vision_start_token_id": "vision_bos_token",
        "vision_end_token_id": "vision_eos_token",
    }
    return {key: tokenizer.convert_tokens_to_ids(OMNI_TOKENS[name]) for key, name in names.items()}

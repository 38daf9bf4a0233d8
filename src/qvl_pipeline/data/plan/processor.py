"""The model's processor, set up as the parameters say, and checked against what was counted without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from qvl_pipeline.config import ModelConfig
from qvl_pipeline.data.base_model import read_base_model
from qvl_pipeline.errors import UserError
from qvl_pipeline.families.hearing import Hearing
from qvl_pipeline.media.frames.store import FrameStore
from qvl_pipeline.media.pixels import normalization, open_image
from qvl_pipeline.media.sound.store import SoundStore
from qvl_pipeline.tokens.chat import render_chats
from qvl_pipeline.tokens.encoding import Medium, encode_chats, video_metadata


def load_processor(base_model: Path, model: ModelConfig) -> ProcessorMixin:
    """Load the processor of a base model and give it the image limits of the parameters.

    Args:
        base_model: Folder with the `manifest.json` of the contract.
        model: Parameters of the model.

    Returns:
        The processor.

    Raises:
        UserError: It cannot be found, or does not fit the model family.
    """
    name = read_base_model(base_model).processor
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"the processor '{name}' cannot be loaded: {error}") from error
    images, videos = processor.image_processor, processor.video_processor
    if hearing := model.family.hearing:
        _check_hearing(processor, hearing, f"'{name}'")
    if (images.patch_size, videos.patch_size) != (model.family.patch_size, model.family.patch_size):
        raise UserError(
            f"the processor '{name}' cuts images into patches of {images.patch_size} pixels and videos into patches of "
            f"{videos.patch_size}, but processor_type {model.processor_type} needs {model.family.patch_size}"
        )
    try:
        normalization(processor)
    except ValueError as error:
        raise UserError(f"the processor '{name}' {error}") from error
    images.size = {"shortest_edge": model.image_min_pixels, "longest_edge": model.image_max_pixels}
    return processor


def _check_hearing(processor: ProcessorMixin, hearing: Hearing, name: str) -> None:
    """Hold the feature extractor to the spectrograms that `sample` makes."""
    found = processor.feature_extractor
    for key, of_processor in (
        ("sampling_rate", found.sampling_rate),
        ("mel_bins", found.feature_size),
        ("hop_length", found.hop_length),
        ("n_fft", found.n_fft),
        ("longest_s", found.chunk_length),
    ):
        if of_processor != getattr(hearing, key):
            raise UserError(
                f"the feature extractor of {name} has {key} {of_processor}, and the family {getattr(hearing, key)}"
            )


def check_token_counts(
    processor: ProcessorMixin, media: Sequence[Medium], store: FrameStore, sounds: SoundStore | None = None
) -> None:
    """Let the real processor handle real media, and compare its tokens and patches with what was counted.

    Args:
        processor: The model's processor.
        media: An image, a clip and a sound, or some of them; of none, nothing is compared. A clip is not heard here.
        store: Sampled clips.
        sounds: Sounds, of a model that hears.

    Raises:
        UserError: It gives other token ids or another number of patches.
    """
    if not media:
        return
    media = [medium | {"spectra": 0} if medium["type"] == "video" else medium for medium in media]
    shown = [{"type": medium["type"]} for medium in media]
    question = {"role": "user", "content": [*shown, {"type": "text", "text": "0"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "0"}]}
    chats = render_chats(processor, [[question, answer]], ["<check of the token counts>"])
    [counted] = encode_chats(processor, chats, [media])
    images = [
        Image.fromarray(open_image(m["key"], m["content_hash"]).transpose(1, 2, 0))
        for m in media
        if m["type"] == "image"
    ]
    clips = [medium for medium in media if medium["type"] == "video"]
    heard = [medium for medium in media if medium["type"] == "audio"]
    real = processor(
        text=[chats[0].text],
        images=images or None,
        **({"audio": [sounds.samples("audio", medium["key"]) for medium in heard]} if heard else {}),
        videos=[torch.tensor(store.frames(clip["key"])) for clip in clips] or None,
        videos_kwargs={
            # Stored frames are sampled and resized already.
            "do_sample_frames": False,
            "do_resize": False,
            "video_metadata": [video_metadata(clip["seconds"]) for clip in clips],
        },
    )
    patches = sum(len(real[name]) for name in ("pixel_values", "pixel_values_videos") if name in real)
    planned = sum(medium["grid_t"] * medium["grid_h"] * medium["grid_w"] for medium in media)
    if real["input_ids"][0] != counted.input_ids.tolist() or patches != planned:
        names = ", ".join(f"'{medium['key']}'" for medium in media)
        raise UserError(
            f"the processor makes {len(real['input_ids'][0])} tokens and {patches} patches of {names}, but "
            f"{len(counted.input_ids)} tokens and {planned} patches were counted: media or processor have changed "
            "since 'validate' and 'sample' ran; run both again, and report this if it stays"
        )

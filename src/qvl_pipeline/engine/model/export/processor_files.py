"""The files of an exported processor: the base model's, in every form in use, with the sampling of the training.

transformers 5 writes one `processor_config.json`; before, `preprocessor_config.json` was for images and
`video_preprocessor_config.json` for clips, and published models have these. They are made where they are missing, as
all releases read them. The single file is only there where the base has it: releases such as 4.49 fail on its parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from qvl_pipeline.engine.model.export.base_files import to_json
from qvl_pipeline.engine.spec import ModelSpec, SamplingSpec
from qvl_pipeline.families import FAMILIES
from qvl_pipeline.media.frames.sampling import FRAME_FACTOR, SHARE_FLOOR, frame_limit

PROCESSOR_FILES = (IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME)

Config = dict[str, Any]


def processor_files(
    base: Mapping[str, bytes], processor: ProcessorMixin, model: ModelSpec, sampling: SamplingSpec
) -> dict[str, bytes]:
    """Make the files of an exported processor.

    Args:
        base: The base model's files of these kinds, by name.
        processor: The base model's processor.
        model: Limits of images, and the family.
        sampling: How clips were sampled.

    Returns:
        The files by name; one in which nothing changed has the bytes of the base.

    Raises:
        ValueError: The base model has no configuration of an image processor.
    """
    found = {name: json.loads(text) for name, text in base.items()}
    single = found.get(PROCESSOR_NAME, {})
    images = single.get("image_processor") or found.get(IMAGE_PROCESSOR_NAME)
    if images is None:
        raise ValueError(f"the processor '{model.processor}' has neither {PROCESSOR_NAME} nor {IMAGE_PROCESSOR_NAME}")
    kind = {"processor_class": type(processor).__name__}
    # Where nothing is said of clips, they are processed as images are: so does transformers.
    videos = single.get("video_processor") or found.get(VIDEO_PROCESSOR_NAME)
    videos = videos or _without(images, "image_processor_type") | {
        "video_processor_type": type(processor.video_processor).__name__
    }
    limits = {"shortest_edge": model.image_min_pixels, "longest_edge": model.image_max_pixels}
    clips = video_values(sampling, processor.video_processor, per_clip=FAMILIES[model.family].limits_are_per_clip)
    size = clips.pop("size")

    def of_images(config: Config) -> Config:
        return _with_size(config, limits)

    def of_videos(config: Config) -> Config:
        return _with_size(config, size) | clips

    made = {
        IMAGE_PROCESSOR_NAME: of_images(found.get(IMAGE_PROCESSOR_NAME, images | kind)),
        VIDEO_PROCESSOR_NAME: of_videos(found.get(VIDEO_PROCESSOR_NAME, videos | kind)),
    }
    if single:
        parts = {"image_processor": of_images, "video_processor": of_videos}
        made[PROCESSOR_NAME] = single | {part: told(single[part]) for part, told in parts.items() if part in single}
    return {name: base[name] if found.get(name) == config else to_json(config) for name, config in made.items()}


def video_values(sampling: SamplingSpec, processor: Any, *, per_clip: bool) -> Config:
    """Say in the words of a video processor how clips were sampled.

    Args:
        sampling: How clips were sampled.
        processor: The video processor: the side of its merged patches in pixels.
        per_clip: Whether its `size` is that of all frames together, and not of each.

    Returns:
        Values of its configuration.
    """
    factor, least = processor.patch_size * processor.merge_size, sampling.video_min_pixels
    budget = {"max_pixels": sampling.video_max_pixels, "total_pixels": sampling.video_total_pixels}
    fixed = sampling.video_sampling_strategy == "frame_num"
    if fixed:
        frames = round(sampling.frame_num / FRAME_FACTOR) * FRAME_FACTOR
        values: Config = {"fps": None, "num_frames": frames}
    else:
        frames = sampling.video_max_frames // FRAME_FACTOR * FRAME_FACTOR
        fewest = -(-sampling.video_min_frames // FRAME_FACTOR) * FRAME_FACTOR
        values = {"fps": sampling.fps, "min_frames": fewest, "max_frames": frames}
    # A frame may have most in the shortest clip. Where all clips have one number of frames, one limit holds for all.
    most = int(frame_limit(frames if fixed else FRAME_FACTOR, factor=factor, min_pixels=least, **budget))
    if not fixed:
        # That many pixels at most are shared out among the frames, as qwen_vl_utils does it. transformers has the key
        # since 5.2x; before, it takes no notice.
        least = min(least, int(most / SHARE_FLOOR))
        tokens = most // factor**2 if per_clip else round(sampling.video_total_pixels / (factor**2 * 0.9))
        values["max_video_tokens"] = tokens
    values["cap_pixels_per_frame"] = not fixed
    size = {"shortest_edge": least, "longest_edge": most}
    if per_clip and fixed:
        size = {edge: pixels * frames for edge, pixels in size.items()}
    elif per_clip:
        size["longest_edge"] = min(FRAME_FACTOR * sampling.video_total_pixels, most * frames)
    return values | {"size": size}


def _with_size(config: Config, size: Mapping[str, int]) -> Config:
    """Set the limits of pixels in the keys that a configuration has; in `size` where it has none."""
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    if not pixels.keys() & config.keys():
        return config | {"size": config.get("size", {}) | size}
    return config | pixels | ({"size": config["size"] | size} if "size" in config else {})


def _without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}

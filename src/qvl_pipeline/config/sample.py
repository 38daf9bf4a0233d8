"""Parameters of the `sample` stage: which frames of a clip the model sees, and at which size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block


class SampleConfig(Block):
    """Video sampling, by the rules of `qwen_vl_utils` 0.0.14 (`smart_nframes`, `smart_resize`).

    Attributes:
        video_backend: Decoder: `pyav`, `torchcodec` or `decord`. The rules of qwen_vl_utils hold for all of them;
            `qwen_vl_utils` is PyAV, which decodes fastest (`benchmarks/data.py`) and is always there.
        video_sampling_strategy: `fps` samples at a rate, `frame_num` takes a fixed number of frames.
        fps: Frames sampled per second of the clip.
        frame_num: Frames per clip, for `frame_num`.
        video_min_frames: Fewest frames per clip, for `fps`.
        video_max_frames: Most frames per clip, for `fps`.
        video_min_pixels: Fewest pixels (height x width) per frame.
        video_max_pixels: Most pixels per frame.
        video_total_pixels: Most pixels per clip, all frames together.
        frame_encoding: How frames are stored. `raw` and `png` are lossless.
        jpeg_quality: Quality of `jpeg`, 1 to 100.
    """

    video_backend: Literal["pyav", "torchcodec", "decord", "qwen_vl_utils"] = "pyav"
    video_sampling_strategy: Literal["fps", "frame_num"] = "fps"
    fps: float = Field(default=2.0, gt=0)
    frame_num: int = Field(default=32, ge=2)
    video_min_frames: int = Field(default=4, ge=2)
    video_max_frames: int = Field(default=768, ge=2)
    video_min_pixels: int = Field(default=128 * 28 * 28, ge=1)
    video_max_pixels: int = Field(default=768 * 28 * 28, ge=1)
    video_total_pixels: int = Field(default=128_000 * 28 * 28 * 9 // 10, ge=1)
    frame_encoding: Literal["raw", "png", "jpeg"] = "png"
    jpeg_quality: int = Field(default=95, ge=1, le=100)

    @model_validator(mode="after")
    def _ordered_limits(self) -> SampleConfig:
        # qwen_vl_utils fails an assertion deep inside when only the maximum is lowered.
        for low, high in (("video_min_frames", "video_max_frames"), ("video_min_pixels", "video_max_pixels")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} ({getattr(self, low)}) is above {high} ({getattr(self, high)}); lower {low} with it"
                )
        return self

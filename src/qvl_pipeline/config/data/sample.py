"""Parameters of the `sample` stage: which frames of a clip the model sees, and at which size."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block, Indifferent


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
        use_audio_in_video: Of models that hear (Qwen2.5-Omni): hear a clip as well as see it; clips without sound stay
            as they are. Sounds of their own are heard in any case.
        materialize: Store the frames, and the spectrograms of sounds. Otherwise only which frames they are is
            stored, and the training loader decodes them every time it reads a clip or sound: the same numbers, without
            the space and with far more CPU time.
        frame_encoding: How frames are stored: `zstd` (filtered like PNG, compressed with Zstandard; smaller than `png`
            and read several times as fast), `png` or `raw`, which change no pixel, or `jpeg`, which is smallest.
        jpeg_quality: Quality of `jpeg`, 1 to 100.
        frame_cache: Folder of finished shards: what was decoded before under the same rules is not decoded again, in
            no profile and after no interruption. `null` keeps none.
        decode_timeout_s: Wall-clock seconds one clip may take before its decoder is killed and its samples quarantined.
        max_reject_fraction: Share of samples that may be quarantined here before the stage fails.
        num_workers: Decoding processes, each of one thread; `null` takes one for every core, of this machine or of the
            Ray cluster.
        memory_gib: Most memory of all decoding processes and the clips that wait to be written; it holds back
            `num_workers`. On Ray it is the most that one clip may need, and each task asks its node for as much as the
            largest clip needs.
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
    use_audio_in_video: bool = False
    materialize: bool = True
    frame_encoding: Literal["zstd", "png", "raw", "jpeg"] = "zstd"
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    frame_cache: Annotated[str | None, Indifferent()] = "data/05_model_input/frame_cache"
    decode_timeout_s: Annotated[float, Indifferent()] = Field(default=600.0, gt=0)
    max_reject_fraction: Annotated[float, Indifferent()] = Field(default=0.05, ge=0, le=1)
    num_workers: Annotated[int | None, Indifferent()] = Field(default=None, ge=1)
    memory_gib: Annotated[float, Indifferent()] = Field(default=8.0, gt=0)

    def decisive(self, of: str | None = None) -> dict[str, Any]:
        """Return what decides the frames; two names of one decoder are the same."""
        return super().decisive(of) | {"video_backend": self.video_backend.replace("qwen_vl_utils", "pyav")}

    @model_validator(mode="after")
    def _ordered_limits(self) -> SampleConfig:
        # qwen_vl_utils fails an assertion deep inside when only the maximum is lowered.
        for low, high in (("video_min_frames", "video_max_frames"), ("video_min_pixels", "video_max_pixels")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} ({getattr(self, low)}) is above {high} ({getattr(self, high)}); lower {low} with it"
                )
        return self

    @model_validator(mode="after")
    def _given_values_are_used(self) -> SampleConfig:
        for key, switch, needed in (
            ("frame_num", "video_sampling_strategy", "frame_num"),
            ("jpeg_quality", "frame_encoding", "jpeg"),
        ):
            if key in self.model_fields_set and getattr(self, switch) != needed:
                raise ValueError(
                    f"{key} is for {switch}: {needed}, but {switch} is '{getattr(self, switch)}': set it, or drop {key}"
                )
        if {"fps", "frame_num"} <= self.model_fields_set:
            raise ValueError("frame_num takes as many frames of any clip, and fps is for another strategy: keep one")
        return self

    @model_validator(mode="after")
    def _clips_keep_to_their_total(self) -> SampleConfig:
        frames = self.frame_num if self.video_sampling_strategy == "frame_num" else self.video_max_frames
        # The rule of qwen_vl_utils: of two frames that become one, the total counts one.
        if self.video_total_pixels * 2 < frames * self.video_min_pixels:
            raise ValueError(
                f"video_total_pixels ({self.video_total_pixels}) cannot be kept to: a clip of {frames} frames has at "
                f"least {frames * self.video_min_pixels // 2}; lower the frames or video_min_pixels, or raise it"
            )
        return self

    @model_validator(mode="after")
    def _same_pixels_on_the_fly(self) -> SampleConfig:
        if not self.materialize and self.frame_encoding == "jpeg":
            raise ValueError(
                "materialize: false decodes the source, whose pixels are not those of frame_encoding: jpeg; "
                "set frame_encoding: zstd, which changes no pixel"
            )
        return self

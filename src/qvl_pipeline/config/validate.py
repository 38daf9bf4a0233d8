"""Parameters of the `validate` stage."""

from __future__ import annotations

from pydantic import Field

from qvl_pipeline.config.base import Block


class ValidateConfig(Block):
    """Limits a sample must keep to.

    Attributes:
        max_reject_fraction: Share of ingested rows that may be rejected or quarantined before the stage fails.
        max_text_chars: Longest text of a sample in characters, all turns together.
        max_image_pixels: Most pixels (height x width) an image or frame may have: a guard against decompression bombs.
        max_aspect_ratio: Longest side over shortest side; `qwen_vl_utils.smart_resize` refuses more than 200.
        min_video_frames: Fewest frames of a clip. Two, because Qwen-VL merges frames in pairs.
        probe_timeout_s: Wall-clock seconds one media file may take to probe before it is quarantined.
    """

    max_reject_fraction: float = Field(default=0.05, ge=0, le=1)
    max_text_chars: int = Field(default=200_000, ge=1)
    max_image_pixels: int = Field(default=178_956_970, ge=1)
    max_aspect_ratio: float = Field(default=200.0, ge=1, le=200)
    min_video_frames: int = Field(default=2, ge=2)
    probe_timeout_s: float = Field(default=60.0, gt=0)

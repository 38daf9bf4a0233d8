"""Parameters of the `validate` stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qvl_pipeline.config.base import Block, Indifferent

Severity = Literal["error", "warn", "off"]
# Rules whose breaking no later stage minds, with what they are when nothing else is said. All others are errors, and
# stay so: their samples could not be decoded, sized or tokenised.
SEVERITIES: dict[str, Severity] = {
    "absurd_fps": "error",
    "absurd_sample_rate": "error",
    "animated_image": "warn",
    "deep_image": "error",
    "duplicate": "warn",
    "duration_mismatch": "error",
    "empty_turn": "error",
    "leakage": "error",
    "silent_sound": "error",
    "too_long": "error",
    "too_many_channels": "error",
    "variable_frame_rate": "warn",
}


class ValidateConfig(Block):
    """Limits a sample must keep to.

    Attributes:
        dataset: Name of the dataset, the title of the validation page; `None` names its sources.
        max_reject_fraction: Share of ingested rows that may be rejected or quarantined before the stage fails.
        max_text_chars: Longest text of a sample in characters, all turns together.
        max_image_pixels: Most pixels (height x width) an image or frame may have: a guard against decompression bombs.
        max_aspect_ratio: Longest side over shortest side; `qwen_vl_utils.smart_resize` refuses more than 200.
        min_video_frames: Fewest frames of a clip. Two, because Qwen-VL merges frames in pairs.
        min_fps: Lowest mean frame rate of a clip that is believed.
        max_fps: Highest mean frame rate of a clip that is believed.
        max_duration_mismatch: How far the frames of a clip may fall short of the duration that its file claims, as a
            share of it; a second is always allowed. More, and the end of the clip is missing.
        audio_max_seconds: Longest sound, or part of one, that is used; longer ones are listed, and never cut. Models
            hear 300 s and no more.
        audio_min_seconds: Shortest one.
        audio_min_peak: Peak, of a full scale of 1, that a sound must reach: else it is silence.
        min_sample_rate: Fewest samples a second of a sound that are believed.
        max_sample_rate: Most samples a second.
        max_channels: Most channels of a sound; they are averaged.
        severity: By rule, `error` (the sample is quarantined), `warn` (it is used, and listed) or `off`, for the rules
            `absurd_fps`, `absurd_sample_rate`, `animated_image`, `deep_image`, `duplicate`, `duration_mismatch`,
            `empty_turn`, `leakage`, `silent_sound`, `too_long`, `too_many_channels` and `variable_frame_rate`. When
            nothing is said, `animated_image`, `duplicate` and `variable_frame_rate` warn; the others are errors.
        probe_timeout_s: Wall-clock seconds one media file may take to probe before it is quarantined.
    """

    dataset: Annotated[str | None, Indifferent()] = None
    # A limit on what may be lost was kept to when it was written, or nothing was.
    max_reject_fraction: Annotated[float, Indifferent()] = Field(default=0.05, ge=0, le=1)
    max_text_chars: int = Field(default=200_000, ge=1)
    max_image_pixels: int = Field(default=178_956_970, ge=1)
    max_aspect_ratio: float = Field(default=200.0, ge=1, le=200)
    min_video_frames: int = Field(default=2, ge=2)
    min_fps: float = Field(default=0.01, gt=0)
    max_fps: float = Field(default=1000.0, gt=0)
    max_duration_mismatch: float = Field(default=0.1, ge=0, le=1)
    audio_max_seconds: float = Field(default=300.0, gt=0, le=300)
    audio_min_seconds: float = Field(default=0.1, ge=0.03)
    audio_min_peak: float = Field(default=1e-4, ge=0, le=1)
    min_sample_rate: int = Field(default=4000, ge=1)
    max_sample_rate: int = Field(default=384_000, ge=1)
    max_channels: int = Field(default=8, ge=1)
    severity: dict[str, Severity] = Field(default_factory=dict)
    probe_timeout_s: Annotated[float, Indifferent()] = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _only_what_can_be_softened(self) -> ValidateConfig:
        for rule in self.severity:
            if rule not in SEVERITIES:
                raise ValueError(
                    f"severity.{rule}: no such rule, or one whose samples no later stage could use; severity can be "
                    f"chosen for {', '.join(sorted(SEVERITIES))}"
                )
        if self.min_fps > self.max_fps:
            raise ValueError(f"min_fps ({self.min_fps:g}) is above max_fps ({self.max_fps:g})")
        for low, high in (("min_sample_rate", "max_sample_rate"), ("audio_min_seconds", "audio_max_seconds")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low):g}) is above {high} ({getattr(self, high):g})")
        return self

    def decisive(self, of: str | None = None) -> dict[str, Any]:
        """Return what decides the valid samples: of a rule, whether it is an error; warnings are only listed."""
        errors = {rule: self.severity_of(rule) == "error" for rule in sorted(SEVERITIES)}
        severity = {rule: "error" if error else "not an error" for rule, error in errors.items()}
        return super().decisive(of) | {"severity": severity}

    def severity_of(self, rule: str) -> Severity:
        """Say what breaking a rule means."""
        return self.severity.get(rule) or SEVERITIES.get(rule, "error")

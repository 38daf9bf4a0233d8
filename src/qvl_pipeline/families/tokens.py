"""Tokens that all families share, by which a chat template builds a prompt."""

from __future__ import annotations

END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
# In a text they would end a turn early, or stand for a picture that is not there.
CONTROL_TOKENS = (
    "<|im_start|>",
    END_OF_TURN,
    END_OF_TEXT,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    # Qwen2.5-Omni's; the published model calls those of pictures otherwise than the other families do.
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|AUDIO|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)

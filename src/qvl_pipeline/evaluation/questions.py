"""The question of a prompt as a person reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

_PATCHES = r"<\|vision_start\|>(?:<\|{kind}_pad\|>)+<\|vision_end\|>"
# Qwen2.5-Omni has names of its own; of a clip that is heard, pictures and sound take turns.
_IMAGE = _PATCHES.format(kind="image") + r"|<\|vision_bos\|>(?:<\|IMAGE\|>)+<\|vision_eos\|>"
_HEARD_CLIP = r"<\|vision_bos\|>(?:<\|audio_bos\|>)?(?:<\|(?:VIDEO|AUDIO)\|>)+(?:<\|audio_eos\|>)?<\|vision_eos\|>"
_SOUND = r"<\|audio_bos\|>(?:<\|AUDIO\|>)+<\|audio_eos\|>"
# Qwen2.5-VL writes one block a clip. Qwen3-VL writes one block a temporal patch, each after its time, and since
# transformers 5.12 all of them inside the template's own pair of markers (vllm-project/vllm#46817).
_VIDEO = _PATCHES.format(kind="video")
_TIMED_VIDEO = rf"(?:<[\d.]+ seconds>{_VIDEO})+"
_CLIP = rf"<\|vision_start\|>{_TIMED_VIDEO}<\|vision_end\|>|{_TIMED_VIDEO}|{_VIDEO}|{_HEARD_CLIP}"
_MEDIUM = re.compile(rf"(?P<image>{_IMAGE})|(?P<video>{_CLIP})|(?P<audio>{_SOUND})")
_USER = "<|im_start|>user\n"


def last_question(tokenizer: PreTrainedTokenizerBase, sample: Mapping[str, Any]) -> str:
    """Decode the last user turn before the answer.

    Args:
        tokenizer: Tokenizer of the model.
        sample: Row of `tokenized_samples`, in ChatML.

    Returns:
        The text of the turn, each image as `[image]`, each clip as `[video]` and each sound as `[audio]`. Earlier user
        turns are `…`, behind their media, which the question may be about. Without a user turn, the first turn.
    """
    prompt = sample["input_ids"][: sample["prompt_length"]]
    text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before, _, turn = text.rpartition(_USER)
    question = _MEDIUM.sub(lambda medium: f"[{medium.lastgroup}] ", turn.partition("<|im_end|>")[0]).strip()
    media = [f"[{medium.lastgroup}]" for medium in _MEDIUM.finditer(before)]
    earlier = [*media, "…"] if _USER in before else []
    return " ".join([*earlier, question])

"""A byte-level BPE tokenizer in Qwen's form, small enough for a model of two million parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

VOCAB_SIZE = 512
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# What every conversation holds around its own text: the roles, and the time Qwen3-VL's processor writes before each
# temporal patch of a clip. Repeated, so that their words become whole tokens whatever the corpus is.
SCAFFOLD = ("system\n", "user\n", "assistant\n", "<0.5 seconds>") * 10_000


# Qwen2.5-Omni's, by the names that its processor asks for.
OMNI_TOKENS = {
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
}


def train_tokenizer(
    corpus: Iterable[str], tokenizer_class: type[PreTrainedTokenizerBase] = Qwen2Tokenizer, *, omni: bool = False
) -> PreTrainedTokenizerBase:
    """Train the tokenizer of the tiny models.

    Normaliser and splitting expression (each digit stands alone) are those of the class of the real models. The result
    depends only on how often each word occurs in `corpus`, not on the order of texts.

    Args:
        corpus: Texts the model will meet.
        tokenizer_class: Class of the real models' tokenizer.
        omni: Have the tokens and the template of Qwen2.5-Omni.

    Returns:
        A tokenizer of at most `VOCAB_SIZE` tokens, with the ChatML template set.
    """
    untrained = tokenizer_class().backend_tokenizer
    bpe = Tokenizer(BPE())
    bpe.normalizer = untrained.normalizer
    bpe.pre_tokenizer = untrained.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - omni * len(OMNI_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(chain(SCAFFOLD, corpus), trainer)
    trained = json.loads(bpe.to_str())["model"]
    return tokenizer_class(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=chat_template("chat_template_omni.jinja" if omni else "chat_template.jinja"),
        **({"model_specific_special_tokens": OMNI_TOKENS} if omni else {}),
    )


def chat_template(name: str = "chat_template.jinja") -> str:
    """The ChatML template (jinja) of the tiny models."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerBase

from qvl_pipeline.demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(corpus: list[str]) -> PreTrainedTokenizerBase:
    return train_tokenizer(corpus)


def test_ids_fit_the_models(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) <= VOCAB_SIZE
    assert len(train_tokenizer([" ".join(chr(97 + n % 26) * (n // 26 + 1) for n in range(2000))])) == VOCAB_SIZE


def test_special_tokens_are_single_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [len(tokenizer(token).input_ids) for token in SPECIAL_TOKENS] == [1] * len(SPECIAL_TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_any_text_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Größe 漢字 \U0001f600\n\n\tx  = 3.14; <b>don't</b>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("4817")[-4:] == ["4", "8", "1", "7"]


def test_words_of_the_corpus_and_timestamps_are_short(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer("Which digit is this?").input_ids) == 5
    assert len(tokenizer("<0.3 seconds>").input_ids) == 6
    assert len(tokenizer("<|im_start|>assistant\n").input_ids) == 3


def test_order_of_texts_does_not_matter() -> None:
    texts = [f"word{n} and {chr(97 + n % 26)}thing" for n in range(300)]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert train_tokenizer(texts).get_vocab() == train_tokenizer(shuffled).get_vocab()


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        ({"role": "user", "content": "Hi <b>"}, "<|im_start|>user\nHi <b><|im_end|>\n"),
        ({"role": "system", "content": [{"type": "text", "text": "a"}]}, "<|im_start|>system\na<|im_end|>\n"),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
            },
            "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n",
        ),
        (
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x.mp4"}}]},
            "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n",
        ),
    ],
)
def test_template(tokenizer: PreTrainedTokenizerBase, message: dict, rendered: str) -> None:
    assert tokenizer.apply_chat_template([message], tokenize=False) == rendered


def test_template_of_several_turns_ends_where_the_answer_starts(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_refuses_unknown_items(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="type 'audio': only text, image and video are known"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)

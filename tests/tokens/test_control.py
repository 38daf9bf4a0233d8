"""What a person writes is never a token that builds a prompt, and everything else is tokenised as it always was."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ProcessorMixin

from qvl_pipeline.data.plan.processor import load_processor
from qvl_pipeline.families.tokens import CONTROL_TOKENS
from qvl_pipeline.tokens.chat import render_chats
from qvl_pipeline.tokens.encoding import EncodedChat, encode_chats


@pytest.fixture(scope="module")
def processor_once(base_model, model) -> ProcessorMixin:
    return load_processor(base_model, model)


def _messages(*said: str, answer: str = "7") -> list[dict[str, Any]]:
    turns = [("user", said), ("assistant", (answer,))]
    return [{"role": role, "content": [{"type": "text", "text": text} for text in texts]} for role, texts in turns]


def _encoded(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> EncodedChat:
    [encoded] = encode_chats(processor, render_chats(processor, [messages], ["a"]), [[]])
    return encoded


# A tag of thoughts is a token of real vocabularies, boxes are special tokens, and the last is what marks are made of.
PIECES = st.sampled_from(
    ["<", "|", "<|", "|>", "<<", "im_end", "<|box_start|>", "<think>", "\n", " ", "a", "é", "🙂", "\ufdd0", "<\ufdd0"]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(said=st.lists(TEXTS, min_size=1, max_size=3), answer=TEXTS.filter(lambda text: not text[0].isspace()))
def test_other_texts_get_the_ids_that_transformers_gives_them(
    processor_once: ProcessorMixin, said: list[str], answer: str
) -> None:
    if any(token in "".join(said) + answer for token in CONTROL_TOKENS):
        return
    messages = _messages(*said, answer=answer)
    text = processor_once.apply_chat_template(messages)
    encoded = _encoded(processor_once, messages)
    assert encoded.input_ids.tolist() == processor_once.tokenizer(text)["input_ids"]
    [(start, end)] = encoded.label_spans
    answered = processor_once.tokenizer(f"{answer}<|im_end|>")["input_ids"]
    assert encoded.input_ids[start:end].tolist() == answered


@pytest.mark.parametrize("token", CONTROL_TOKENS)
@pytest.mark.parametrize("cut", [0, 1, 2, 5])
def test_a_control_token_that_is_written_stays_text(processor: ProcessorMixin, token: str, cut: int) -> None:
    said = (f"a {token[:cut]}", f"{token[cut:]} b", f"{token}{token}")
    encoded = _encoded(processor, _messages(*said, answer=f"7 {token} 8"))
    control = set(processor.tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))
    plain = _encoded(processor, _messages("a"))
    assert [i for i in encoded.input_ids if i in control] == [i for i in plain.input_ids if i in control]
    [(start, end)] = encoded.label_spans
    assert processor.tokenizer.decode(encoded.input_ids[start:end]) == f"7 {token} 8<|im_end|>"
    assert processor.tokenizer.decode(encoded.input_ids[: encoded.prompt_length]).startswith(
        f"<|im_start|>user\n{''.join(said)}<|im_end|>\n"
    )

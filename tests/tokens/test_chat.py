from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ProcessorMixin

from qvl_pipeline.errors import UserError
from qvl_pipeline.tokens.chat import render_chats
from qvl_pipeline.tokens.encoding import encode_chats
from tests.data.samples import conversation

END = "<|im_end|>"


def answers(processor: ProcessorMixin, turns: list[tuple[str, str]]) -> list[str]:
    messages, _ = conversation(turns)
    [chat] = render_chats(processor, [messages], ["a"])
    return [chat.text[start:end] for start, end in chat.answers]


def trained_text(processor: ProcessorMixin, turns: list[tuple[str, str]]) -> str:
    messages, _ = conversation(turns)
    chats = render_chats(processor, [messages], ["a"])
    [encoded] = encode_chats(processor, chats, [[]])
    return "".join(processor.tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.label_spans)


@pytest.mark.parametrize(
    "question",
    [
        "assistant",
        "The assistant\nassistant\n said 3",
        "<|im_start|>assistant\n9<|im_end|>\n",
        "<|im_end|>\n<|im_start|>assistant\n9",
        "assistant\n7<|im_end|>",
    ],
)
def test_what_a_user_writes_is_never_an_answer(processor: ProcessorMixin, question: str) -> None:
    assert answers(processor, [("user", question), ("assistant", "7")]) == [f"7{END}"]
    assert trained_text(processor, [("user", question), ("assistant", "7")]) == f"7{END}"


def test_every_turn_of_the_assistant_is_found(processor: ProcessorMixin) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "1"), ("user", "1"), ("assistant", ""), ("user", "1")]
    assert answers(processor, turns) == [f"1{END}", END]


def test_thoughts_and_tool_calls_are_trained_on_when_the_assistant_says_them(processor: ProcessorMixin) -> None:
    """Real vocabularies have them as tokens of their own."""
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    processor.tokenizer.add_tokens(tags)
    call = '<think>\nThe assistant must look.\n</think>\n\n<tool_call>\n{"name": "zoom"}\n</tool_call>'
    turns = [
        ("user", "<tool_call>assistant</tool_call> <think>?</think>"),
        ("assistant", call),
        ("user", "<tool_response>\n7\n</tool_response>"),
        ("assistant", "7"),
    ]
    assert answers(processor, turns) == [f"{call}{END}", f"7{END}"]
    assert trained_text(processor, turns) == f"{call}{END}7{END}"


def test_what_the_template_says_for_the_assistant_is_not_trained_on(processor: ProcessorMixin) -> None:
    """Templates of thinking models begin the thought in the generation prompt."""
    processor.chat_template = (
        "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
        "{%- if message.role == 'assistant' -%}{{- '<think>\n' -}}{%- endif -%}"
        "{{- message.content[0].text + '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
    )
    turns = [("user", "a"), ("assistant", "so</think>1"), ("user", "b"), ("assistant", "no</think>2")]
    assert trained_text(processor, turns) == f"so</think>1{END}no</think>2{END}"


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(
    lambda text: "<|" not in text
)


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_trained_tokens_are_the_answers_for_any_text(
    processor_once: ProcessorMixin, turns: list[tuple[str, str]]
) -> None:
    chat = [part for user, said in turns for part in (("user", user), ("assistant", said))]
    expected = "".join(f"{said}{END}" for _, said in turns)
    assert trained_text(processor_once, chat) == unicodedata.normalize("NFC", expected)


@pytest.fixture(scope="module")
def processor_once(base_model, model) -> ProcessorMixin:
    from qvl_pipeline.data.plan.processor import load_processor

    return load_processor(base_model, model)


def test_a_system_turn_that_the_template_adds_is_not_an_answer(processor: ProcessorMixin) -> None:
    """Qwen2.5-VL's template begins with "You are a helpful assistant." where there is no system turn."""
    processor.chat_template = (
        "{%- for message in messages -%}{%- if loop.first and message.role != 'system' -%}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{%- endif -%}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content[0].text + '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )
    turns = [("user", "a"), ("assistant", "1"), ("user", "b"), ("assistant", "2")]
    assert answers(processor, turns) == [f"1{END}", f"2{END}"]
    assert trained_text(processor, turns) == f"1{END}2{END}"


def test_a_template_that_rewrites_earlier_turns_is_an_error(processor: ProcessorMixin) -> None:
    processor.chat_template = (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
        "{%- if message.role != 'assistant' or loop.last -%}{{ message.content[0].text }}{%- endif -%}<|im_end|>\n"
        "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    assert answers(processor, [("user", "a"), ("assistant", "1")]) == [f"1{END}"]
    turns = [("user", "a"), ("assistant", "1"), ("user", "b"), ("assistant", "2")]
    with pytest.raises(UserError, match=r"sample 'a': the chat template renders the beginning .* in another way"):
        answers(processor, turns)


def test_a_template_without_an_end_of_turn_is_an_error(processor: ProcessorMixin) -> None:
    processor.chat_template = "{%- for message in messages -%}{{ message.content[0].text }}{%- endfor -%}"
    with pytest.raises(UserError, match=r"does not close the assistant's turn by <\|im_end\|>"):
        answers(processor, [("user", "a"), ("assistant", "1")])


def test_a_template_with_nothing_before_the_answer_is_an_error(processor: ProcessorMixin) -> None:
    """Its first token would be predicted from the last one of the sample before it in the pack."""
    processor.chat_template = "{%- for message in messages -%}{{ message.content[0].text }}<|im_end|>{%- endfor -%}"
    assert answers(processor, [("user", "a"), ("assistant", "1")]) == [f"1{END}"]
    with pytest.raises(UserError, match="sample 'a': the chat template renders nothing before the answer"):
        answers(processor, [("assistant", "1")])


def test_a_refused_conversation_is_named_among_many(processor: ProcessorMixin) -> None:
    processor.chat_template = "{{ raise_exception('no tools here') if messages[0].role == 'tool' else 'x' }}"
    chats = [conversation([(role, "a"), ("assistant", "1")])[0] for role in ("user", "tool", "user")]
    with pytest.raises(UserError, match="sample 'second': the chat template refuses it: no tools here"):
        render_chats(processor, chats, ["first", "second", "third"])


def test_a_conversation_without_an_answer_is_an_error(processor: ProcessorMixin) -> None:
    with pytest.raises(UserError, match="sample 'a': it has no assistant turn"):
        answers(processor, [("user", "a")])

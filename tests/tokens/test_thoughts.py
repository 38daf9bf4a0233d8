"""Thoughts: which of them a template leaves out once a conversation goes on, and what is trained on then."""

from __future__ import annotations

import json

import pytest
from transformers import ProcessorMixin

from qvl_pipeline.data.plan.turns import divided_conversations, with_prompts_of_turns
from qvl_pipeline.tokens.chat import prompts_of_turns, render_chats
from qvl_pipeline.tokens.encoding import encode_chats
from qvl_pipeline.tokens.thoughts import prompt_of, thought, without_thoughts
from tests.data.samples import conversation, samples_table

END = "<|im_end|>"
# As Qwen3.5's: thoughts (or an empty one) only in answers to the last question, and one opened in the prompt.
THINKS = (
    "{%- set ns = namespace(asked=-1) -%}"
    "{%- for turn in messages -%}{%- if turn.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}{%- for turn in messages -%}"
    "{%- set said = turn.content | map(attribute='text') | join('') -%}{%- set thought = '' -%}"
    "{%- if turn.role == 'assistant' and '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1] | trim -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + turn.role + '\n' -}}"
    "{%- if turn.role == 'assistant' and loop.index0 > ns.asked -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- said + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
# As that of the small ones, which are not to think unless they are told.
DOES_NOT_THINK = THINKS.replace("enable_thinking is defined and enable_thinking is false", "not enable_thinking")
TWICE = [
    ("user", "a?"),
    ("assistant", f"{thought('so')}1"),
    ("user", "b?"),
    ("assistant", f"{thought('no')}2"),
]
PLAIN = [(role, without_thoughts(text)) for role, text in TWICE]


@pytest.fixture
def thinker(processor: ProcessorMixin) -> ProcessorMixin:
    processor.chat_template = THINKS
    return processor


def parts(processor: ProcessorMixin, turns: list[tuple[str, str]], **options: bool) -> tuple[str, str]:
    """Prompt and answer, as text, of a conversation that is one prompt; the answer by its tokens."""
    [chat] = render_chats(processor, [conversation(turns)[0]], ["a"], **options)
    [encoded] = encode_chats(processor, [chat], [[]])
    [(start, end)] = encoded.label_spans
    return chat.text[: chat.answers[-1][0]], processor.tokenizer.decode(encoded.input_ids[start:end])


def served(processor: ProcessorMixin, turns: list[tuple[str, str]], **options: bool) -> str:
    return processor.apply_chat_template(conversation(turns)[0], add_generation_prompt=True, **options)


def test_answers_that_come_out_differently_later_have_prompts_of_their_own(thinker: ProcessorMixin) -> None:
    for turns in (TWICE, PLAIN):
        assert prompts_of_turns(thinker, conversation(turns)[0], "a") == [(2, [1]), (4, [3])]


def test_thoughts_between_calls_of_tools_stay_together(thinker: ProcessorMixin) -> None:
    turns = [*TWICE[:2], ("tool", "3"), ("assistant", f"{thought('three')}3"), *TWICE[2:]]
    assert prompts_of_turns(thinker, conversation(turns)[0], "a") == [(4, [1, 3]), (6, [5])]


def test_turn_that_nobody_answers_is_left_out(thinker: ProcessorMixin) -> None:
    turns = [*TWICE, ("user", "and?")]
    assert prompts_of_turns(thinker, conversation(turns)[0], "a") == [(2, [1]), (4, [3])]


def test_template_that_leaves_turns_as_they_were_divides_nothing(processor: ProcessorMixin) -> None:
    assert prompts_of_turns(processor, conversation(TWICE)[0], "a") == [(4, [1, 3])]
    table = samples_table([{"messages": TWICE}])
    assert with_prompts_of_turns(table, processor, last_turn_only=True) is table


@pytest.mark.parametrize("template", [THINKS, DOES_NOT_THINK], ids=["thinks", "does not think"])
def test_prompts_are_those_that_are_served(processor: ProcessorMixin, template: str) -> None:
    processor.chat_template = template
    assert parts(processor, TWICE[:2]) == (
        served(processor, TWICE[:1], enable_thinking=True),
        f"so\n</think>\n\n1{END}",
    )
    assert parts(processor, PLAIN[:2]) == (served(processor, PLAIN[:1], enable_thinking=False), f"1{END}")


def test_empty_thoughts_are_trained_on_where_that_is_asked_for(thinker: ProcessorMixin) -> None:
    _, answer = parts(thinker, PLAIN[:2], ignore_empty_think=False)
    assert answer.lstrip("\n") == f"</think>\n\n1{END}"


def test_each_answer_becomes_a_row_and_the_last_keeps_the_name(thinker: ProcessorMixin) -> None:
    shown = [("user", [("image", "1.png"), "a?"]), TWICE[1], ("user", [("image", "2.png"), "b?"]), TWICE[3]]
    table = samples_table([{"messages": shown}, {"messages": TWICE[:2]}, {"messages": TWICE, "split": "eval"}])
    table.attrs = {"made_with": {}}
    # The template knows no images: what is asked here is only which rows there are.
    texts = "selectattr('type', 'equalto', 'text') | map(attribute='text')"
    thinker.chat_template = THINKS.replace("map(attribute='text')", texts)
    rows = with_prompts_of_turns(table, thinker, last_turn_only=False)
    assert rows.attrs == table.attrs
    assert rows["sample_id"].tolist() == ["source/0#turn2", "source/0", "source/1", "source/2"]
    assert rows["answer"].tolist() == ["1", "7", "7", "7"]
    assert [[item["path"] for item in media] for media in rows["media"]] == [["1.png"], ["1.png", "2.png"], [], []]
    trained = [[turn.get("trained", True) for turn in json.loads(messages)] for messages in rows["messages"]]
    assert trained == [[True] * 2, [True, False, True, True], [True] * 2, [True, False, True, True]]
    assert divided_conversations(rows["sample_id"].tolist()) == {"source/0": 1}
    assert with_prompts_of_turns(table, thinker, last_turn_only=True)["sample_id"].tolist() == [
        "source/0",
        "source/1",
        "source/2",
    ]
    render_chats(thinker, [json.loads(messages) for messages in rows["messages"]], rows["sample_id"].tolist())


def test_answers_are_scored_without_their_thoughts() -> None:
    assert without_thoughts(f"{thought('so')}1") == "1"
    assert without_thoughts("so, of course\n</think>\n\n1") == "1"  # begun in the prompt
    assert without_thoughts("1") == "1"


def test_prompt_that_is_no_beginning_is_left_to_be_refused() -> None:
    assert prompt_of("a<think>\n\n</think>\n\n", "b<think>\n") == "a<think>\n\n</think>\n\n"

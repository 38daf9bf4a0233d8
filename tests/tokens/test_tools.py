"""Tools, turns that are not trained on, and plain texts: which tokens are trained on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import ProcessorMixin

from qvl_pipeline.families.tokens import END_OF_TEXT
from qvl_pipeline.tokens.chat import render_chats
from qvl_pipeline.tokens.encoding import MediaGrids, encode_samples
from qvl_pipeline.tokens.unusable import TOKENIZE_RULES, Unusable, UnusableSampleError

END = "<|im_end|>"
# ChatML, in which tools are listed in front, calls are written into the answer, and results come as a user's turn.
HEAD = "{%- for tool in tools or [] -%}{{- '<tool>' + tool | tojson + '\n' -}}{%- endfor -%}"
CALLS = (
    "{%- for call in message.tool_calls or [] -%}{{- '<call>' + call.function.name + ' ' "
    "+ call.function.arguments | tojson + '</call>' -}}{%- endfor -%}"
)
ROLE = "('user' if message.role == 'tool' else message.role)"
TAIL = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"


def template(head: str = HEAD, calls: str = CALLS, results: bool = True) -> str:
    shown = "true" if results else "message.role != 'tool'"
    turn = (
        "{{- '<|im_start|>' + "
        + ROLE
        + " + '\n' -}}{%- for item in message.content -%}{{- item.text -}}{%- endfor -%}"
        + calls
        + "{{- '<|im_end|>\n' -}}"
    )
    turns = "{%- for message in messages -%}{%- if " + shown + " -%}" + turn + "{%- endif -%}{%- endfor -%}"
    return head + turns + TAIL


def said(role: str, text: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if text else []} | more


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CHAT = [
    said("user", "Sun?", tools=TOOLS),
    said("assistant", tool_calls=[call("Rome"), call("Oslo")]),
    said("tool", "blue"),
    said("tool", "grey"),
    said("assistant", "In Rome.", trained=False),
    said("user", "And Bern?"),
    said("assistant", "I look.", tool_calls=[call("Bern")]),
]


def encoded(processor: ProcessorMixin, messages: list[dict[str, Any]], answer: str = "") -> Any:
    row = {"sample_id": "a", "messages": json.dumps(messages), "media": [], "answer": answer}
    row |= {name: "" for name in ("source", "split", "kind", "task")}
    [sample] = encode_samples([row], MediaGrids(processor, {}, None), processor)
    return sample


def trained(processor: ProcessorMixin, sample: dict[str, Any]) -> list[str]:
    return [processor.tokenizer.decode(sample["input_ids"][start:end]) for start, end in sample["label_spans"]]


def test_calls_are_trained_on_and_tools_and_results_are_not(processor: ProcessorMixin) -> None:
    processor.chat_template = template()
    sample = encoded(processor, CHAT)
    rome, oslo, bern = (f'<call>weather {{"city": "{city}"}}</call>' for city in ("Rome", "Oslo", "Bern"))
    assert trained(processor, sample) == [f"{rome}{oslo}{END}", f"I look.{bern}{END}"]
    assert sample["answer"] == f"I look.{bern}"
    assert encoded(processor, CHAT, answer="7")["answer"] == "7"
    turns = [{key: value for key, value in turn.items() if key not in ("tools", "trained")} for turn in CHAT]
    text = processor.apply_chat_template(turns, tools=TOOLS)
    assert sample["input_ids"].tolist() == processor.tokenizer(text)["input_ids"]


def test_conversations_with_and_without_tools_share_a_batch(processor: ProcessorMixin) -> None:
    processor.chat_template = template()
    plain = [said("user", "a"), said("assistant", "b")]
    other = [said("user", "a", tools=[*TOOLS, *TOOLS]), said("assistant", "b")]
    chats = [plain, CHAT, plain, other, CHAT]
    together = render_chats(processor, chats, list("abcde"))
    alone = [render_chats(processor, [chat], [name])[0] for chat, name in zip(chats, "abcde", strict=True)]
    assert together == alone
    assert [chat.text.count("<tool>") for chat in together] == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"head": ""}, "the tools"),
        ({"calls": ""}, "the tool calls of turn 1"),
        ({"results": False}, "the result in turn 2"),
    ],
)
def test_a_template_that_leaves_out_tools_is_refused(
    processor: ProcessorMixin, changes: dict[str, Any], left_out: str
) -> None:
    processor.chat_template = template(**changes)
    found = encoded(processor, CHAT)
    assert isinstance(found, Unusable)
    assert (found.rule, found.reason.partition(":")[0]) == (
        "tools_not_rendered",
        f"the chat template leaves out {left_out}",
    )
    assert trained(processor, encoded(processor, [said("user", "a"), said("assistant", "b")])) == [f"b{END}"]


def test_a_control_token_in_a_call_stays_text(processor: ProcessorMixin) -> None:
    processor.chat_template = template()
    chat = [said("user", "Sun?", tools=TOOLS), said("assistant", tool_calls=[call("<|im_end|>")])]
    sample = encoded(processor, chat)
    assert trained(processor, sample) == [f'<call>weather {{"city": "<|im_end|>"}}</call>{END}']
    assert sample["input_ids"].tolist().count(processor.tokenizer.convert_tokens_to_ids(END)) == 2


def test_a_conversation_without_a_trained_answer_is_refused(processor: ProcessorMixin) -> None:
    with pytest.raises(UnusableSampleError, match="sample 'a': it has no assistant turn to train on"):
        render_chats(processor, [[said("user", "a"), said("assistant", "b", trained=False)]], ["a"])


def test_of_a_plain_text_all_tokens_are_trained_on_that_something_predicts(processor: ProcessorMixin) -> None:
    sample = encoded(processor, [said("text", "Which digit is <|im_end|> this?")])
    ids = sample["input_ids"].tolist()
    assert processor.tokenizer.decode(ids) == f"Which digit is <|im_end|> this?{END_OF_TEXT}"
    assert (sample["label_spans"], sample["prompt_length"]) == ([(1, len(ids))], 0)
    control = processor.tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    assert [id_ for id_ in ids if id_ in control] == control[1:]


def test_every_rule_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [rule for rule in TOKENIZE_RULES if f"| `{rule}` |" not in page] == []

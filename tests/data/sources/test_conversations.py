"""Rows in every accepted form become the same conversation; every other form is refused with its reason."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.rejection import RejectedRowError
from qvl_pipeline.data.sources.forms.conversations import Conversation, to_conversation

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _turns(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": [_text("A cat.")]}]


def _openai(*items: Any, **columns: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "A cat."}
    return {"messages": [{"role": "user", "content": list(items)}, answer], **columns}


def _sharegpt(value: str, **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A cat."}], **columns}


A_CAT = Conversation(_turns(IMAGE, _text("What is this?")), [Media("image", "a.png")])

A_CAT_IN_QWEN_FORM = _openai({"type": "image", "image": "a.png"}, _text("What is this?"))

SAME_CONVERSATION = {
    "openai": _openai({"type": "image_url", "image_url": {"url": "a.png"}}, _text("What is this?")),
    "openai, url as text": _openai({"type": "image_url", "image_url": "a.png"}, _text("What is this?")),
    "openai, wish for a resolution": _openai(
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, _text("What is this?")
    ),
    "qwen": A_CAT_IN_QWEN_FORM,
    "transformers": _openai({"type": "image", "path": "a.png"}, _text("What is this?")),
    "file in a column": _openai(IMAGE, _text("What is this?"), images=["a.png"]),
    "sharegpt": _sharegpt("<image>What is this?", images=["a.png"], videos=[]),
    "llava": _sharegpt("<image>What is this?", image="a.png"),
    "marker in a plain content": {
        "messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A cat."}],
        "images": [{"path": "a.png", "bytes": None}],
    },
    "json text": {"messages": orjson.dumps(A_CAT_IN_QWEN_FORM["messages"]).decode()},
    "parquet, unused keys null": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "text": None, "image_url": {"url": "a.png"}, "video_url": {"url": None}},
                    {"type": "text", "text": "What is this?", "image_url": None, "video_url": None},
                ],
                "tool_calls": None,
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A cat.", "image_url": None}], "tool_calls": []},
        ],
        "conversations": None,
        "images": None,
    },
}


@pytest.mark.parametrize("row", SAME_CONVERSATION.values(), ids=SAME_CONVERSATION.keys())
def test_every_form_gives_the_same_conversation(row: dict[str, Any]) -> None:
    assert to_conversation(row) == A_CAT


def test_plain_content_is_one_text() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    assert to_conversation(row) == Conversation(
        [{"role": "system", "content": [_text("Be brief.")]}, {"role": "user", "content": [_text("Hi")]}], []
    )


def test_media_are_in_reading_order_not_in_that_of_the_columns() -> None:
    row = _sharegpt("<video>, <image> and <image>?", images=["1.png", "2.png"], videos=["a.mp4"])
    messages, media = to_conversation(row)
    assert messages[0]["content"] == [VIDEO, _text(", "), IMAGE, _text(" and "), IMAGE, _text("?")]
    assert [use.path for use in media] == ["a.mp4", "1.png", "2.png"]


def test_text_around_markers_is_not_altered() -> None:
    messages, _ = to_conversation(_sharegpt("  <image>\nWhat?\n", images=["a.png"]))
    assert messages[0]["content"] == [_text("  "), IMAGE, _text("\nWhat?\n")]


def test_marker_in_an_openai_text_without_media_columns_is_text() -> None:
    row = {"messages": [{"role": "user", "content": "What does <image> do in HTML?"}]}
    assert to_conversation(row).messages[0]["content"] == [_text("What does <image> do in HTML?")]


@pytest.mark.parametrize(
    ("columns", "paths"),
    [
        ({"images": ["1.png"]}, ["1.png"]),
        ({"images": ["1.png", "2.png", "3.png"]}, ["1.png", "2.png", "3.png"]),
        ({}, []),
    ],
)
def test_too_few_and_too_many_files_are_kept_for_validation(columns: dict[str, Any], paths: list[str]) -> None:
    messages, media = to_conversation(_sharegpt("<image><image>Same?", **columns))
    assert messages[0]["content"] == [IMAGE, IMAGE, _text("Same?")]
    assert [use.path for use in media] == paths


@pytest.mark.parametrize(
    "item",
    [
        {"type": "video", "video": "a.mp4", "video_start": 1, "video_end": 2.5},
        {"type": "video_url", "video_url": {"url": "a.mp4", "video_start": 1, "video_end": 2.5}},
        {"type": "video_url", "video_url": {"url": "a.mp4"}, "video_start": 1.0, "video_end": 2.5},
    ],
)
def test_part_of_a_clip(item: dict[str, Any]) -> None:
    assert to_conversation(_openai(item)).media == [Media("video", "a.mp4", 1.0, 2.5)]


def test_part_of_a_listed_clip() -> None:
    row = _sharegpt("<video>?", videos=[{"path": "a.mp4", "video_end": 2}])
    assert to_conversation(row).media == [Media("video", "a.mp4", None, 2.0)]


def test_unknown_roles_are_left_to_validation() -> None:
    row = {"conversations": [{"from": "system", "value": "a"}, {"from": "tool", "value": "b"}]}
    assert [message["role"] for message in to_conversation(row).messages] == ["system", "tool"]


UNKNOWN_FORMATS = [
    ({"text": "hello"}, "it has neither 'messages' nor 'conversations'"),
    (_openai() | _sharegpt("a"), "it has both 'messages' and 'conversations'"),
    ({"messages": "hello"}, "'messages' is a text that is not JSON"),
    ({"messages": {"role": "user"}}, "'messages' is an object, not a list"),
    ({"messages": ["hello"]}, "messages[0] is a text, not an object"),
    ({"messages": [{"content": "hello"}]}, "messages[0].role is null, not a text"),
    ({"messages": [{"role": "user"}]}, "the content of messages[0] is null, not a list"),
    ({"messages": [{"role": "user", "content": 3}]}, "the content of messages[0] is a number, not a list"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, "tool_calls[0].name is null"),
    ({"messages": [{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]}, "only the assistant calls tools"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "a text that is not JSON"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}]}, "is a list, not an obj"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "output": 1}]}]}, "has the key 'output'"),
    ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "conversations[0].value is a text that is not"),
    (_openai(tools=[{"description": "a"}]), "tools[0] has no 'name'"),
    (_openai(tools="{"), "'tools' is a text that is not JSON"),
    ({"messages": [], "tools": [{"name": "f"}]}, "it has 'tools', but no turn"),
    (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        "weight is 0.5: a turn is trained on",
    ),
    ({"messages": [{"role": "user", "content": "a", "train": True}]}, "only answers are trained on"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 1, "train": False}]}, "contradict each other"),
    ({"instruction": "a", "output": 3}, "'output' is a number, not a text"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0] is no pair of question and answer"),
    ({"message": []}, "but 'message'; known forms are openai (messages: role, content), sharegpt"),
    ({"message": []}, ": rename 'message' to 'messages'"),
    ({"prompt": "a", "completion": "b"}, "completion, prompt: rename them to 'instruction' and 'output'"),
    ({"text": "a"}, "text: say `format: text` of the source"),
    (_openai("hello"), "messages[0].content[0] is a text, not an object"),
    (
        _openai({"type": "document"}),
        "messages[0].content[0] has the type 'document'; known are text, input_audio, image_url",
    ),
    (_openai({"type": ["text"]}), "has the type ['text']"),
    (_openai({"text": "hello"}), "has the type None"),
    (_openai({"type": "text", "text": None}), "messages[0].content[0].text is null, not a text"),
    (_openai({"type": "text", "text": "a", "fps": 2}), "has the key 'fps', which is not supported"),
    (_openai({"type": "image", "image": "a.png", "max_pixels": 99}), "has the key 'max_pixels'"),
    (_openai({"type": "image", "image": "a.png", "video_start": 1}), "has the key 'video_start'"),
    (_openai({"type": "image", "image": "a.png", "url": "b.png"}), "messages[0].content[0] names 2 files"),
    (_openai({"type": "image", "image": 7}), "the path of messages[0].content[0] is a number, not a text"),
    (_openai({"type": "image", "image": ""}), "the path of messages[0].content[0] is empty"),
    (_openai({"type": "video", "video": ["1.png", "2.png"]}), "the path of messages[0].content[0] is a list, not"),
    (_openai({"type": "image_url", "image_url": {"detail": "low"}}), "the path of messages[0].content[0] is null"),
    (_openai({"type": "video", "video": "a.mp4", "video_start": -1}), "video_start is -1, not a second from 0 on"),
    (_openai({"type": "video", "video": "a.mp4", "video_end": "9"}), "video_end is '9', not a second from 0 on"),
    (_openai({"type": "video", "video": "a.mp4", "video_end": True}), "video_end is True, not a second"),
    (_openai({"type": "video", "video": "a.mp4", "video_end": float("nan")}), "video_end is nan, not a second"),
    (_openai({"type": "video", "video": "a.mp4", "video_start": 2, "video_end": 2}), "ends at second 2.0, not after"),
    (_openai({"type": "video", "video": "a.mp4", "video_end": 0}), "ends at second 0.0, not after its start at 0.0"),
    (_sharegpt("<image>", images=[{"bytes": "x", "path": "a.png"}]), "images[0].bytes is a text, not bytes"),
    (_sharegpt("<image>", images=[None]), "the path of images[0] is null, not a text"),
    ({"conversations": [{"from": "human", "value": "a", "mood": 0}]}, "conversations[0] has the key 'mood'"),
]


@pytest.mark.parametrize(("row", "reason"), UNKNOWN_FORMATS)
def test_unknown_format_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedRowError) as caught:
        to_conversation(row)
    assert caught.value.rule == "unknown_format"
    assert reason in caught.value.detail


def test_system_column_is_the_first_turn() -> None:
    row = {
        "system": "You speak French.",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    }
    assert [message["role"] for message in to_conversation(row).messages] == ["system", "user", "assistant"]
    assert to_conversation(row).messages[0]["content"] == [{"type": "text", "text": "You speak French."}]


FUNCTION = {"name": "weather", "description": "Look out.", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
ASKED = [
    {"role": "user", "content": [_text("Sun?")], "tools": [{"type": "function", "function": FUNCTION}]},
    {"role": "assistant", "content": [], "tool_calls": [CALL]},
    {"role": "tool", "content": [_text('{"sky": "blue"}')]},
    {"role": "assistant", "content": [_text("Yes.")]},
]
ARGUMENTS = '{"city": "Rome", "days": 2}'
SAME_CALL = {
    "openai": {
        "tools": [{"type": "function", "function": FUNCTION}],
        "messages": [
            {"role": "user", "content": "Sun?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
                "refusal": None,
            },
            {"role": "tool", "content": '{"sky": "blue"}'},
            {"role": "assistant", "content": "Yes."},
        ],
    },
    "openai, before tool calls": {
        "tools": [FUNCTION],
        "messages": [
            {"role": "user", "content": "Sun?"},
            {"role": "assistant", "content": "", "function_call": {"name": "weather", "arguments": ARGUMENTS}},
            {"role": "function", "content": '{"sky": "blue"}'},
            {"role": "assistant", "content": "Yes."},
        ],
    },
    "llama-factory v1": {
        "tools": orjson.dumps([FUNCTION]).decode(),
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "Sun?"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_call", "value": f'{{"name": "weather", "arguments": {ARGUMENTS}}}'}],
            },
            {"role": "tool", "content": [{"type": "text", "value": '{"sky": "blue"}'}]},
            {"role": "assistant", "content": [{"type": "text", "value": "Yes."}]},
        ],
    },
    "sharegpt": {
        "tools": orjson.dumps([FUNCTION]).decode(),
        "conversations": [
            {"from": "human", "value": "Sun?"},
            {"from": "function_call", "value": f'{{"name": "weather", "arguments": {ARGUMENTS}}}'},
            {"from": "observation", "value": '{"sky": "blue"}'},
            {"from": "gpt", "value": "Yes."},
        ],
    },
}


@pytest.mark.parametrize("row", SAME_CALL.values(), ids=SAME_CALL.keys())
def test_every_form_of_tools_gives_the_same_conversation(row: dict[str, Any]) -> None:
    assert to_conversation(row) == Conversation(ASKED, [])


def test_names_and_ids_of_calls_are_kept() -> None:
    turns = [
        {"role": "user", "name": "Ann", "content": "Sun?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "weather", "arguments": {}}]},
        {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "blue"},
    ]
    user, call, result = to_conversation({"messages": turns}).messages
    assert user == {"role": "user", "content": [_text("Sun?")], "name": "Ann"}
    assert call["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {}}}]
    assert result == {"role": "tool", "content": [_text("blue")], "name": "weather", "tool_call_id": "c1"}


@pytest.mark.parametrize("key", ["weight", "train", "loss_mask", "loss_weight"])
def test_a_turn_that_is_not_to_be_trained_on_is_marked(key: str) -> None:
    turns = [("human", 0), ("gpt", 0), ("human", False), ("gpt", True), ("human", None), ("gpt", 1.0)]
    row = {"conversations": [{"from": role, "value": "a", key: value} for role, value in turns]}
    assert [turn.get("trained") for turn in to_conversation(row).messages] == [None, False, None, None, None, None]


def test_alpaca() -> None:
    row = {"instruction": "<image>Name it.", "input": "In French.", "output": "Chat.", "images": ["a.png"]}
    history = [["Hello?", "Hi."]]
    messages, media = to_conversation(row | {"system": "Be brief.", "history": history})
    assert [(turn["role"], turn["content"]) for turn in messages] == [
        ("system", [_text("Be brief.")]),
        ("user", [_text("Hello?")]),
        ("assistant", [_text("Hi.")]),
        ("user", [IMAGE, _text("Name it.\nIn French.")]),
        ("assistant", [_text("Chat.")]),
    ]
    assert media == [Media("image", "a.png")]
    plain = to_conversation({"instruction": "Name it.", "input": "", "output": "Chat."}).messages
    assert plain[0]["content"] == [_text("Name it.")]


def test_items_with_a_type_and_a_value() -> None:
    """LLaMA-Factory's second form."""
    row = _openai({"type": "image_url", "value": "a.png"}, {"type": "text", "value": "What is this?"})
    row["messages"][0]["loss_weight"] = 0.0
    assert to_conversation(row) == A_CAT


def test_a_plain_text_is_one_turn_and_only_where_the_source_says_so() -> None:
    assert to_conversation({"text": "Once.", "url": "x"}, "text") == Conversation(
        [{"role": "text", "content": [_text("Once.")]}], []
    )
    with pytest.raises(RejectedRowError, match=r"it has 'messages', which a plain text \(format: text\) does not"):
        to_conversation({"text": "Once.", "messages": [{}]}, "text")


def test_another_form_than_the_source_says_is_named() -> None:
    with pytest.raises(RejectedRowError, match="in the form 'openai', and its source says `format: sharegpt`: say ope"):
        to_conversation(_openai(), "sharegpt")
    assert to_conversation(_sharegpt("a"), "llava") == to_conversation(_sharegpt("a"), "sharegpt")


@pytest.mark.parametrize("column", ["chosen", "rejected", "rejected_response", "preference", "output_2"])
def test_preference_data_is_refused_before_anything_else(column: str) -> None:
    with pytest.raises(RejectedRowError, match=f"'{column}' .* makes it preference data") as caught:
        to_conversation({column: "A dog.", "prompt": "What is this?"})
    assert caught.value.rule == "preference_data"


@pytest.mark.parametrize(
    "columns",
    [{"label": "cat"}, {"label": 1}, {"label": None}, {"kto_tag": None}, {"chosen": None, "rejected": []}],
    ids=str,
)
def test_a_class_or_an_empty_column_is_no_preference(columns: dict[str, Any]) -> None:
    assert to_conversation(A_CAT_IN_QWEN_FORM | columns) == A_CAT


def test_a_column_that_has_its_name_already_is_not_to_be_renamed() -> None:
    with pytest.raises(RejectedRowError) as refused:
        to_conversation({"id": 1, "kind": "a", "images": ["a.png"], "videos": []})
    assert refused.value.detail.endswith("a plain `text`"), "no column here is a misspelt one"


def test_a_thought_goes_before_its_answer() -> None:
    row = _openai(_text("What is this?"))
    row["messages"][1]["reasoning_content"] = "It has <image> whiskers.\n"
    _, answer = to_conversation(row).messages
    assert answer["content"] == [_text("<think>\nIt has <image> whiskers.\n</think>\n\n"), _text("A cat.")]
    row["messages"][0]["reasoning_content"] = "What may it be?"
    with pytest.raises(RejectedRowError, match=r"messages\[0\] has 'reasoning_content'.*only the assistant thinks"):
        to_conversation(row)

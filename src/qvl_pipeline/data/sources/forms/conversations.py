"""How a row of each known form becomes a conversation in canonical form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from qvl_pipeline.data.messages import Media, Message
from qvl_pipeline.data.sources.forms.checked import Row, expect, is_given, parsed, refuse_unknown, unknown
from qvl_pipeline.data.sources.forms.items import MEDIA_COLUMNS, listed_media, read_items
from qvl_pipeline.data.sources.forms.preferences import refuse_preferences
from qvl_pipeline.data.sources.forms.tools import is_call, read_calls, read_tools
from qvl_pipeline.data.sources.forms.unknown_form import no_form, other_form
from qvl_pipeline.tokens.thoughts import thought

TURN_COLUMNS = ("messages", "conversations")
_MEDIA = [column for names in MEDIA_COLUMNS.values() for column in names]
_CONVERSATION_COLUMNS = frozenset({*TURN_COLUMNS, *_MEDIA, "system", "tools"})
# Columns that only one form reads; in rows of another they are put aside.
_ALPACA_COLUMNS = frozenset({"instruction", "input", "output", "history"})
_TEXT_COLUMNS = frozenset({"text"})

# Keys of a turn: role and content, in OpenAI form and in ShareGPT form; and what else is read of one.
_OPENAI, _SHAREGPT = ("role", "content"), ("from", "value")
_THOUGHT = "reasoning_content"
_TRAINED_KEYS = ("weight", "train", "loss_mask", "loss_weight")
_TURN_KEYS = {
    _OPENAI: {*_OPENAI, _THOUGHT, "name", "tool_calls", "tool_call_id", "function_call", *_TRAINED_KEYS},
    _SHAREGPT: {*_SHAREGPT, *_TRAINED_KEYS},
}
_PLAIN_KEYS = {keys: frozenset(keys) for keys in _TURN_KEYS}
_ROLES = {
    _OPENAI: {"function": "tool"},
    _SHAREGPT: {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"},
}
# The role of the one turn that a plain text is.
TEXT_ROLE = "text"


class Conversation(NamedTuple):
    """A conversation in canonical form.

    Attributes:
        messages: Turns `{"role", "content"}`; content is a list of `{"type": "text", "text"}`, `{"type": "image"}`,
            `{"type": "video"}` and `{"type": "audio"}`. No text is altered. Where they are used, a turn also has
            `tool_calls` (in OpenAI's form, arguments an object), `tool_call_id`, `name`, and `"trained": false` when it
            is not to be trained on; the first turn has the `tools` of the conversation. A plain text is one turn of the
            role `text`.
        media: Files of the image, video and audio items in reading order, then those that no item asks for.
    """

    messages: list[Message]
    media: list[Media]


def to_conversation(row: Row, form: str = "auto") -> Conversation:
    """Read the conversation of a row.

    Args:
        row: Columns of the row.
        form: A key of `FORMATS`, or `auto` to go by the row.

    Returns:
        The conversation, with media paths as the row has them.

    Raises:
        RejectedRowError: The row is not in this form, or in none that is known (`unknown_format`), or compares
            or judges answers (`preference_data`).
    """
    refuse_preferences(row)
    if form == "text":
        return text(row)
    if _is_alpaca(row):
        found = "alpaca"
    else:
        row = _with_turns(row)
        found = detect_format(row)
    if form not in ("auto", found) and {form, found} != {"sharegpt", "llava"}:
        raise other_form(found, form)
    conversation = FORMATS[found if form == "auto" else form](row)
    if tools := read_tools(row.get("tools")):
        if not conversation.messages:
            raise unknown("it has 'tools', but no turn")
        conversation.messages[0]["tools"] = tools
    return conversation


def read_columns(row: Row, form: str) -> frozenset[str]:
    """Name the columns that the conversation of a row is read from; all others are put aside.

    Args:
        row: Columns of the row.
        form: Form that its source states, or `auto`.
    """
    if form == "text":
        return _CONVERSATION_COLUMNS | _TEXT_COLUMNS
    return _CONVERSATION_COLUMNS | _ALPACA_COLUMNS if _is_alpaca(row) else _CONVERSATION_COLUMNS


def openai(row: Row) -> Conversation:
    """Turns have `role` and `content`: a text, or a list of items that name their files.

    Items without a file take theirs from the columns `image`, `images`, `video`, `videos`, `audio`, `audios`, in order;
    when there is such a column, so do the markers `<image>`, `<video>` and `<audio>` in texts. A thought in
    `reasoning_content` goes before its answer, as Qwen's templates read and write it.
    """
    marked = not row.keys().isdisjoint(_MEDIA) and any(is_given(row.get(column)) for column in _MEDIA)
    return _conversation(row, _OPENAI, _MEDIA, marked=marked)


def sharegpt(row: Row) -> Conversation:
    """Turns have `from` and `value`; the markers `<image>`, `<video>`, `<audio>` stand for files, listed by kind.

    The columns are `images`, `videos` and `audios`. A `function_call` is the JSON text of one or more calls by the
    assistant, and an `observation` their result.
    """
    return _conversation(row, _SHAREGPT, ("images", "videos", "audios"), marked=True)


def llava(row: Row) -> Conversation:
    """As ShareGPT, with the file or files in the columns `image`, `video` and `audio`."""
    return _conversation(row, _SHAREGPT, tuple(MEDIA_COLUMNS), marked=True)


def alpaca(row: Row) -> Conversation:
    """`instruction`, a line break and `input`, where there is any, are asked, and `output` is answered.

    `history` is a list of pairs of question and answer before; markers stand for files as in the OpenAI form.
    """
    asked = [expect(str, row[column], f"'{column}'") for column in ("instruction", "input") if row.get(column)]
    pairs = []
    for number, pair in enumerate(expect(list, parsed(row.get("history") or [], "'history'"), "'history'")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise unknown(f"history[{number}] is no pair of question and answer")
        pairs.append(pair)
    pairs.append(["\n".join(asked), row.get("output")])
    turns = [
        {"role": role, "content": expect(str, said, "a question or answer of 'history' or 'output'")}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    return openai({**{name: value for name, value in row.items() if name not in _ALPACA_COLUMNS}, "messages": turns})


def text(row: Row) -> Conversation:
    """The column `text` is a plain text, of which all tokens are trained on; only where the source says so."""
    given = [column for column in (*TURN_COLUMNS, *_MEDIA, "system", "tools") if is_given(row.get(column))]
    if given:
        raise unknown(f"it has '{given[0]}', which a plain text (format: text) does not: leave it out, or the format")
    content = expect(str, row.get("text"), "'text'")
    return Conversation([{"role": TEXT_ROLE, "content": [{"type": "text", "text": content}]}], [])


# A new form is a function here, and its name in `DatasetSource.format`.
FORMATS: dict[str, Callable[[Row], Conversation]] = {
    form.__name__: form for form in (openai, sharegpt, llava, alpaca, text)
}


def detect_format(row: Row) -> str:
    """Name the form of a row with turns, by the keys of the first and the columns of its media."""
    column = _turn_column(row)
    turns = expect(list, row[column], f"'{column}'")
    if not turns or not is_given(expect(dict, turns[0], f"{column}[0]").get("from")):
        return "openai"
    return "llava" if any(is_given(row.get(kind)) for kind in MEDIA_COLUMNS) else "sharegpt"


def _is_alpaca(row: Row) -> bool:
    if row.get("instruction") is None or "output" not in row:
        return False
    return all(row.get(column) is None for column in TURN_COLUMNS)


def _conversation(row: Row, keys: tuple[str, str], columns: Sequence[str], *, marked: bool) -> Conversation:
    """Read turns that have these keys; files are named in the items, or in these columns."""
    listed: dict[str, list[Media]] = {}
    if not row.keys().isdisjoint(_MEDIA):
        listed = {kind: listed_media(row, kind, columns) for kind in MEDIA_COLUMNS}
    messages, media = _system_turn(row), []
    for where, turn in _turns(row):
        message, content = _open_turn(turn, keys, where)
        for item, own in read_items(content, where, marked=marked):
            message["content"].append(item)
            if item["type"] != "text" and (own or listed.get(item["type"])):
                media.append(own or listed[item["type"]].pop(0))
        messages.append(message)
    return Conversation(messages, media + [file for files in listed.values() for file in files])


def _system_turn(row: Row) -> list[Row]:
    """Return the turn that ShareGPT rows keep in a column of its own, as a list of none or one."""
    if not is_given(row.get("system")):
        return []
    said = expect(str, row["system"], "'system'")
    return [{"role": "system", "content": [{"type": "text", "text": said}]}] if said else []


def _turn_column(row: Row) -> str:
    messages, conversations = TURN_COLUMNS
    if row.get(messages) is None:
        if row.get(conversations) is None:
            raise no_form(row, sorted(_CONVERSATION_COLUMNS | _ALPACA_COLUMNS))
        return conversations
    if row.get(conversations) is not None:
        raise unknown("it has both 'messages' and 'conversations'")
    return messages


def _with_turns(row: Row) -> Row:
    """Parse the turns of a row that holds them as a JSON text."""
    column = _turn_column(row)
    return {**row, column: parsed(row[column], f"'{column}'")} if isinstance(row[column], str) else row


def _turns(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield every turn with its place in the row."""
    column = _turn_column(row)
    for number, turn in enumerate(expect(list, row[column], f"'{column}'")):
        where = f"{column}[{number}]"
        yield where, expect(dict, turn, where)


def _open_turn(turn: Row, keys: tuple[str, str], where: str) -> tuple[Message, Any]:
    """Return a turn with all but its content, and the content as it is given."""
    role_key, content_key = keys
    plain = turn.keys() == _PLAIN_KEYS[keys]  # most turns: there is nothing else to look for
    if not plain:
        refuse_unknown(turn, _TURN_KEYS[keys], where)
    given = expect(str, turn.get(role_key), f"{where}.{role_key}")
    role, content = _ROLES[keys].get(given, given), turn.get(content_key)
    message: Message = {"role": role, "content": []}
    if given == "function_call":
        message["tool_calls"], content = read_calls(content, f"{where}.{content_key}"), ""
    elif isinstance(content, list) and any(map(is_call, content)):
        calls = [item for item in content if is_call(item)]
        message["tool_calls"] = read_calls([item.get("value") for item in calls], f"{where}.{content_key}")
        content = [item for item in content if not is_call(item)]
    elif not plain and (call := _call_key(turn)):
        message["tool_calls"] = read_calls(turn[call], f"{where}.{call}")
        content = "" if content is None else content
    if "tool_calls" in message and role != "assistant":
        raise unknown(f"{where} has a call of a tool, and the role '{role}': only the assistant calls tools")
    if not plain:
        message["content"] += _thought_of(turn, role, where)
        if message["content"] and content is None:
            content = ""
        message |= {key: turn[key] for key in ("name", "tool_call_id") if is_given(turn.get(key))}
        if not _is_trained(turn, role, where):
            message["trained"] = False
    return message, content


def _call_key(turn: Row) -> str | None:
    return next((key for key in ("tool_calls", "function_call") if is_given(turn.get(key))), None)


def _thought_of(turn: Row, role: str, where: str) -> list[Row]:
    """Return the text item of what the assistant thought before this turn, if it says so."""
    if not is_given(turn.get(_THOUGHT)):
        return []
    if role != "assistant":
        raise unknown(f"{where} has '{_THOUGHT}', and the role '{role}': only the assistant thinks")
    return [{"type": "text", "text": thought(expect(str, turn[_THOUGHT], f"{where}.{_THOUGHT}"))}]


def _is_trained(turn: Row, role: str, where: str) -> bool:
    """Whether a turn is trained on, if it is the assistant's: OpenAI's `weight`, and its namesakes elsewhere."""
    given = {key: turn[key] for key in _TRAINED_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise unknown(f"{where}.{key} is {value!r}: a turn is trained on or not, so it must be 0 or 1")
        if value and role != "assistant":
            raise unknown(f"{where}.{key} is {value!r} in a turn of the role '{role}': only answers are trained on")
        if bool(value) != bool(next(iter(given.values()))):
            raise unknown(f"{where} has {' and '.join(map(repr, given))}, which contradict each other")
    return role != "assistant" or all(given.values())

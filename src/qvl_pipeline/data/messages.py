"""The canonical form of a conversation, and how a row in OpenAI or ShareGPT form becomes one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from qvl_pipeline.data.rejection import RejectedRowError, type_name

Row = dict[str, Any]
Message = dict[str, Any]

TURN_COLUMNS = ("messages", "conversations")
MEDIA_COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}
CONVERSATION_COLUMNS = frozenset({*TURN_COLUMNS, *MEDIA_COLUMNS["image"], *MEDIA_COLUMNS["video"]})

# Keys of a turn: role and content, in OpenAI form and in ShareGPT form.
_OPENAI, _SHAREGPT = ("role", "content"), ("from", "value")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_MARKER = re.compile("<(image|video)>")

_ITEM_TYPES = {"text": "text", "image_url": "image", "image": "image", "video_url": "video", "video": "video"}
# Where an item keeps its file: OpenAI's key, Qwen's, and those of transformers' chat templates.
_LOCATIONS = {"image": ("image_url", "image", "url", "path"), "video": ("video_url", "video", "url", "path")}
_WINDOW = ("video_start", "video_end")
# `detail` is OpenAI's wish for a resolution; sizes are parameters here.
_ITEM_KEYS = {
    "text": {"type", "text"},
    "image": {"type", "detail", *_LOCATIONS["image"]},
    "video": {"type", *_LOCATIONS["video"], *_WINDOW},
}
_FILE_KEYS = {"image": {"url", "path", "detail"}, "video": {"url", "path", *_WINDOW}}


class Media(NamedTuple):
    """One use of a media file.

    Attributes:
        type: `image` or `video`.
        path: Path of the file.
        start: First second used of a clip; `None` is its beginning.
        end: Last second used of a clip; `None` is its end.
    """

    type: str
    path: str
    start: float | None = None
    end: float | None = None


class Conversation(NamedTuple):
    """A conversation in canonical form.

    Attributes:
        messages: Turns `{"role", "content"}`; content is a list of `{"type": "text", "text"}`, `{"type": "image"}` and
            `{"type": "video"}`. No text is altered.
        media: Files of the image and video items in reading order, then those that no item asks for.
    """

    messages: list[Message]
    media: list[Media]


def to_conversation(row: Row) -> Conversation:
    """Read the conversation of a row.

    Turns are in the column `messages` or `conversations`, a list or a JSON text of one, in OpenAI form (`role`,
    `content`) or ShareGPT form (`from`, `value`). Files are named in the content items, or in the columns `image`,
    `images`, `video`, `videos`, from which items without a file of their own and the markers `<image>` and `<video>`
    take theirs in order. Markers count in ShareGPT texts, and in OpenAI texts when the row has such a column.

    Args:
        row: Columns of the row.

    Returns:
        The conversation, with media paths as the row has them.

    Raises:
        RejectedRowError: The row is in no form that is known (`unknown_format`).
    """
    listed = {kind: _listed_media(row, kind) for kind in MEDIA_COLUMNS}
    messages, media = _system_turn(row), []
    for where, turn in _turns(row):
        role, content, marked = _open_turn(turn, where)
        items = []
        for item, own in _items(content, where, marked or any(listed.values())):
            items.append(item)
            if item["type"] != "text" and (own or listed[item["type"]]):
                media.append(own or listed[item["type"]].pop(0))
        messages.append({"role": role, "content": items})
    return Conversation(messages, media + listed["image"] + listed["video"])


def is_given(value: Any) -> bool:
    """Whether a value says anything. Columnar files give every object every key, and null to those it does not use."""
    if isinstance(value, dict):
        return any(is_given(part) for part in value.values())
    return value is not None and value != []


def _system_turn(row: Row) -> list[Row]:
    """Return the turn that ShareGPT rows keep in a column of its own, as a list of none or one."""
    if is_given(row.get("tools")):
        raise _unknown("it has 'tools', which are not supported: write them into the system turn")
    if not is_given(row.get("system")):
        return []
    text = _expect(str, row["system"], "'system'")
    return [{"role": "system", "content": [{"type": "text", "text": text}]}] if text else []


def _turns(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield every turn with its place in the row."""
    columns = [column for column in TURN_COLUMNS if row.get(column) is not None]
    if len(columns) != 1:
        found = "both 'messages' and" if columns else "neither 'messages' nor"
        raise _unknown(f"it has {found} 'conversations'")
    (column,) = columns
    turns = row[column]
    if isinstance(turns, str):
        try:
            turns = orjson.loads(turns)
        except orjson.JSONDecodeError as error:
            raise _unknown(f"'{column}' is a text that is not JSON ({error})") from error
    for number, turn in enumerate(_expect(list, turns, f"'{column}'")):
        where = f"{column}[{number}]"
        yield where, _expect(dict, turn, where)


def _open_turn(turn: Row, where: str) -> tuple[str, Any, bool]:
    """Return role and content of a turn, and whether it is in ShareGPT form."""
    role_key, content_key = keys = _SHAREGPT if is_given(turn.get("from")) else _OPENAI
    _refuse_unknown(turn, set(keys), where)
    role = _expect(str, turn.get(role_key), f"{where}.{role_key}")
    if keys == _SHAREGPT:
        return _SHAREGPT_ROLES.get(role, role), turn.get(content_key), True
    return role, turn.get(content_key), False


def _items(content: Any, where: str, marked: bool) -> Iterator[tuple[Row, Media | None]]:
    """Yield the canonical items of a content, each with the file that it names itself."""
    if isinstance(content, str):
        pieces = _MARKER.split(content) if marked else [content]
        # Texts and markers take turns in what `split` returns.
        for number, piece in enumerate(pieces):
            if number % 2:
                yield {"type": piece}, None
            elif piece:
                yield {"type": "text", "text": piece}, None
        return
    for number, item in enumerate(_expect(list, content, f"the content of {where}")):
        place = f"{where}.content[{number}]"
        yield _item(_expect(dict, item, place), place)


def _item(item: Row, where: str) -> tuple[Row, Media | None]:
    kind = _ITEM_TYPES.get(item.get("type")) if isinstance(item.get("type"), str) else None
    if kind is None:
        raise _unknown(f"{where} has the type {item.get('type')!r}; known are {', '.join(_ITEM_TYPES)}")
    _refuse_unknown(item, _ITEM_KEYS[kind], where)
    if kind == "text":
        return {"type": "text", "text": _expect(str, item.get("text"), f"{where}.text")}, None
    files = [item[key] for key in _LOCATIONS[kind] if is_given(item.get(key))]
    if len(files) > 1:
        raise _unknown(f"{where} names {len(files)} files; an item has one")
    window = [item.get(key) for key in _WINDOW]
    return {"type": kind}, _media(kind, files[0], where, window) if files else None


def _listed_media(row: Row, kind: str) -> list[Media]:
    """Return the files that the row lists outside of its turns."""
    files = []
    for column in MEDIA_COLUMNS[kind]:
        value = row.get(column)
        values = value if isinstance(value, list) else [value] if is_given(value) else []
        files += [_media(kind, file, f"{column}[{number}]", [None, None]) for number, file in enumerate(values)]
    return files


def _media(kind: str, file: Any, where: str, window: list[Any]) -> Media:
    """Read what names a file: its path, or an object with the path and, for a clip, the seconds to use."""
    if isinstance(file, dict):
        _refuse_unknown(file, _FILE_KEYS[kind], where)
        path = file["url"] if is_given(file.get("url")) else file.get("path")
        window = [value if is_given(value) else file.get(key) for value, key in zip(window, _WINDOW, strict=True)]
    else:
        path = file
    start, end = (_second(value, f"{where}.{key}") for value, key in zip(window, _WINDOW, strict=True))
    if end is not None and end <= (start or 0.0):
        raise _unknown(f"{where} ends at second {end}, not after its start at {start or 0.0}")
    if not _expect(str, path, f"the path of {where}"):
        raise _unknown(f"the path of {where} is empty")
    return Media(kind, path, start, end)


def _second(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise _unknown(f"{where} is {value!r}, not a second from 0 on")
    return float(value)


def _refuse_unknown(given: Row, known: set[str], where: str) -> None:
    """Refuse keys that would be ignored: a tool call, a frame rate, a picture's bytes."""
    unknown = sorted(str(key) for key, value in given.items() if key not in known and is_given(value))
    if unknown:
        raise _unknown(f"{where} has the key '{unknown[0]}', which is not supported")


def _expect(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise _unknown(f"{where} is {type_name(value)}, not {type_name(kind())}")
    return value


def _unknown(detail: str) -> RejectedRowError:
    return RejectedRowError("unknown_format", detail)

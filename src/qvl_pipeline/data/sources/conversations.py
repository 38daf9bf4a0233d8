"""How a row of each known form becomes a conversation in canonical form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from qvl_pipeline.data.messages import Media, Message
from qvl_pipeline.data.rejection import RejectedRowError, type_name
from qvl_pipeline.data.sources.preferences import refuse_preferences

Row = dict[str, Any]

TURN_COLUMNS = ("messages", "conversations")
MEDIA_COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}
AUDIO_COLUMNS = ("audio", "audios")
CONVERSATION_COLUMNS = frozenset({*TURN_COLUMNS, *MEDIA_COLUMNS["image"], *MEDIA_COLUMNS["video"], *AUDIO_COLUMNS})

# Keys of a turn: role and content, in OpenAI form and in ShareGPT form.
_OPENAI, _SHAREGPT = ("role", "content"), ("from", "value")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_MARKER = re.compile("<(image|video)>")

_AUDIO_TYPES = ("audio_url", "audio", "input_audio")
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
# `bytes` is how Hugging Face datasets embed a file in a table.
_FILE_KEYS = {"image": {"url", "path", "bytes", "detail"}, "video": {"url", "path", "bytes", *_WINDOW}}


class Conversation(NamedTuple):
    """A conversation in canonical form.

    Attributes:
        messages: Turns `{"role", "content"}`; content is a list of `{"type": "text", "text"}`, `{"type": "image"}` and
            `{"type": "video"}`. No text is altered.
        media: Files of the image and video items in reading order, then those that no item asks for.
    """

    messages: list[Message]
    media: list[Media]


def to_conversation(row: Row, form: str = "auto") -> Conversation:
    """Read the conversation of a row.

    Turns are in the column `messages` or `conversations`, a list or a JSON text of one.

    Args:
        row: Columns of the row.
        form: A key of `FORMATS`, or `auto` to go by the row.

    Returns:
        The conversation, with media paths as the row has them.

    Raises:
        RejectedRowError: The row is not in this form, or in none that is known (`unknown_format`), holds audio
            (`audio_not_supported`), or compares or judges answers (`preference_data`).
    """
    refuse_preferences(row)
    if any(is_given(row.get(column)) for column in AUDIO_COLUMNS):
        raise _audio("the row")
    row = _with_turns(row)
    return FORMATS[detect_format(row) if form == "auto" else form](row)


def openai(row: Row) -> Conversation:
    """Turns have `role` and `content`: a text, or a list of items that name their files.

    Items without a file take theirs from the columns `image`, `images`, `video`, `videos`, in order; when there is such
    a column, so do the markers `<image>` and `<video>` in texts.
    """
    columns = [column for names in MEDIA_COLUMNS.values() for column in names]
    return _conversation(row, _OPENAI, columns, marked=any(is_given(row.get(column)) for column in columns))


def sharegpt(row: Row) -> Conversation:
    """Turns have `from` and `value`; the markers `<image>` and `<video>` stand for the files of `images`, `videos`."""
    return _conversation(row, _SHAREGPT, ("images", "videos"), marked=True)


def llava(row: Row) -> Conversation:
    """As ShareGPT, with the file or files in the columns `image` and `video`."""
    return _conversation(row, _SHAREGPT, ("image", "video"), marked=True)


# A new form is a function here, and its name in `DatasetSource.format`.
FORMATS: dict[str, Callable[[Row], Conversation]] = {"openai": openai, "sharegpt": sharegpt, "llava": llava}


def detect_format(row: Row) -> str:
    """Name the form of a row, by the keys of its first turn and the columns of its media."""
    _, turn = next(_turns(row), ("", {}))
    if not is_given(turn.get("from")):
        return "openai"
    return "llava" if is_given(row.get("image")) or is_given(row.get("video")) else "sharegpt"


def _conversation(row: Row, keys: tuple[str, str], columns: Sequence[str], *, marked: bool) -> Conversation:
    """Read turns that have these keys; files are named in the items, or in these columns."""
    listed = {kind: _listed_media(row, kind, columns) for kind in MEDIA_COLUMNS}
    messages, media = _system_turn(row), []
    for where, turn in _turns(row):
        role, content = _open_turn(turn, keys, where)
        items = []
        for item, own in _items(content, where, marked):
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


def _turn_column(row: Row) -> str:
    columns = [column for column in TURN_COLUMNS if row.get(column) is not None]
    if len(columns) != 1:
        found = "both 'messages' and" if columns else "neither 'messages' nor"
        raise _unknown(f"it has {found} 'conversations'")
    return columns[0]


def _with_turns(row: Row) -> Row:
    """Parse the turns of a row that holds them as a JSON text."""
    column = _turn_column(row)
    if not isinstance(row[column], str):
        return row
    try:
        return {**row, column: orjson.loads(row[column])}
    except orjson.JSONDecodeError as error:
        raise _unknown(f"'{column}' is a text that is not JSON ({error})") from error


def _turns(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield every turn with its place in the row."""
    column = _turn_column(row)
    for number, turn in enumerate(_expect(list, row[column], f"'{column}'")):
        where = f"{column}[{number}]"
        yield where, _expect(dict, turn, where)


def _open_turn(turn: Row, keys: tuple[str, str], where: str) -> tuple[str, Any]:
    """Return role and content of a turn."""
    role_key, content_key = keys
    _refuse_unknown(turn, set(keys), where)
    role = _expect(str, turn.get(role_key), f"{where}.{role_key}")
    return _SHAREGPT_ROLES.get(role, role) if keys == _SHAREGPT else role, turn.get(content_key)


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
    if item.get("type") in _AUDIO_TYPES:
        raise _audio(where)
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


def _listed_media(row: Row, kind: str, columns: Sequence[str]) -> list[Media]:
    """Return the files that the row lists outside of its turns."""
    files = []
    for column in MEDIA_COLUMNS[kind]:
        value = row.get(column)
        values = value if isinstance(value, list) else [value] if is_given(value) else []
        if values and column not in columns:
            raise _unknown(f"it has '{column}', which its form does not know; known are {' and '.join(columns)}")
        files += [_media(kind, file, f"{column}[{number}]", [None, None]) for number, file in enumerate(values)]
    return files


def _media(kind: str, file: Any, where: str, window: list[Any]) -> Media:
    """Read what names a file: its path or content, or an object with these and, for a clip, the seconds to use."""
    if isinstance(file, dict):
        _refuse_unknown(file, _FILE_KEYS[kind], where)
        window = [value if is_given(value) else file.get(key) for value, key in zip(window, _WINDOW, strict=True)]
        file = _location(file, where)
    start, end = (_second(value, f"{where}.{key}") for value, key in zip(window, _WINDOW, strict=True))
    if end is not None and end <= (start or 0.0):
        raise _unknown(f"{where} ends at second {end}, not after its start at {start or 0.0}")
    if not isinstance(file, bytes) and not _expect(str, file, f"the path of {where}"):
        raise _unknown(f"the path of {where} is empty")
    return Media(kind, file, start, end)


def _location(file: Row, where: str) -> Any:
    """Return the content of a file when the object has it, else its path."""
    if is_given(file.get("bytes")):
        return _expect(bytes, file["bytes"], f"{where}.bytes")
    return file["url"] if is_given(file.get("url")) else file.get("path")


def _second(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise _unknown(f"{where} is {value!r}, not a second from 0 on")
    return float(value)


def _refuse_unknown(given: Row, known: set[str], where: str) -> None:
    """Refuse keys that would be ignored: a tool call, a frame rate, a picture's bytes."""
    if given.keys() <= known:
        return
    if unknown := sorted(str(key) for key, value in given.items() if key not in known and is_given(value)):
        raise _unknown(f"{where} has the key '{unknown[0]}', which is not supported")


def _expect(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise _unknown(f"{where} is {type_name(value)}, not {type_name(kind())}")
    return value


def _unknown(detail: str) -> RejectedRowError:
    return RejectedRowError("unknown_format", detail)


def _audio(where: str) -> RejectedRowError:
    return RejectedRowError("audio_not_supported", f"{where} holds audio, and no supported model hears: leave it out")

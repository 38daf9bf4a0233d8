"""Contents of turns as items of text and media, and the files that these items and the columns of a row name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from qvl_pipeline.data.messages import Media
from qvl_pipeline.data.sources.forms.checked import Row, expect, is_given, refuse_unknown, unknown

MEDIA_COLUMNS = {"image": ("image", "images"), "video": ("video", "videos"), "audio": ("audio", "audios")}
_MARKER = re.compile("<(image|video|audio)>")

_ITEM_TYPES = {"text": "text", "input_audio": "audio"} | {
    name: kind for kind in MEDIA_COLUMNS for name in (f"{kind}_url", kind)
}
# Where an item keeps its file: OpenAI's key, Qwen's, those of transformers' chat templates, and LLaMA-Factory's.
_LOCATIONS = {
    "image": ("image_url", "image", "url", "path", "value"),
    "video": ("video_url", "video", "url", "path", "value"),
    "audio": ("audio_url", "audio", "input_audio", "url", "path", "value"),
}
_PLAIN_TEXT = {"type", "text"}
# Which seconds of a file are used.
_WINDOWS = {"video": ("video_start", "video_end"), "audio": ("audio_start", "audio_end")}
_ALL = [None, None]
# `detail` is OpenAI's wish for a resolution; sizes are parameters here.
_ITEM_KEYS = {
    "text": {"type", "text", "value"},
    "image": {"type", "detail", *_LOCATIONS["image"]},
    **{kind: {"type", *_LOCATIONS[kind], *_WINDOWS[kind]} for kind in _WINDOWS},
}
# `bytes` is how Hugging Face datasets embed a file in a table.
_FILE_KEYS = {
    "image": {"url", "path", "bytes", "detail"},
    "video": {"url", "path", "bytes", *_WINDOWS["video"]},
    # `data` and `format` are OpenAI's `input_audio`.
    "audio": {"url", "path", "bytes", "data", "format", *_WINDOWS["audio"]},
}


def read_items(content: Any, where: str, *, marked: bool) -> Iterator[tuple[Row, Media | None]]:
    """Yield the canonical items of a content, each with the file that it names itself.

    Args:
        content: A text, or a list of items.
        where: Place of the turn in the row.
        marked: Whether `<image>`, `<video>` and `<audio>` in a text stand for media.

    Raises:
        RejectedRowError: It is something else (`unknown_format`).
    """
    if isinstance(content, str):
        pieces = _MARKER.split(content) if marked and "<" in content else [content]
        # Texts and markers take turns in what `split` returns.
        for number, piece in enumerate(pieces):
            if number % 2:
                yield {"type": piece}, None
            elif piece:
                yield {"type": "text", "text": piece}, None
        return
    for number, item in enumerate(expect(list, content, f"the content of {where}")):
        if _is_plain(item):  # most items: there is nothing else to look for
            yield {"type": "text", "text": item["text"]}, None
            continue
        place = f"{where}.content[{number}]"
        yield _item(expect(dict, item, place), place)


def listed_media(row: Row, kind: str, columns: Sequence[str]) -> list[Media]:
    """Return the files that the row lists outside of its turns.

    Raises:
        RejectedRowError: They are in another column than one of `columns`, or are no files (`unknown_format`).
    """
    files = []
    for column in MEDIA_COLUMNS[kind]:
        if column not in row:
            continue
        value = row[column]
        values = value if isinstance(value, list) else [value] if is_given(value) else []
        if values and column not in columns:
            raise unknown(f"it has '{column}', which its form does not know; known are {' and '.join(columns)}")
        files += [_media(kind, file, f"{column}[{number}]", _ALL) for number, file in enumerate(values)]
    return files


def _is_plain(item: Any) -> bool:
    if not isinstance(item, dict) or item.keys() != _PLAIN_TEXT:
        return False
    return item["type"] == "text" and isinstance(item["text"], str)


def _item(item: Row, where: str) -> tuple[Row, Media | None]:
    kind = _ITEM_TYPES.get(item.get("type")) if isinstance(item.get("type"), str) else None
    if kind is None:
        raise unknown(f"{where} has the type {item.get('type')!r}; known are {', '.join(_ITEM_TYPES)}")
    refuse_unknown(item, _ITEM_KEYS[kind], where)
    if kind == "text":
        text = item.get("value") if item.get("text") is None else item["text"]
        return {"type": "text", "text": expect(str, text, f"{where}.text")}, None
    files = [value for key, value in item.items() if key in _LOCATIONS[kind] and is_given(value)]
    if len(files) > 1:
        raise unknown(f"{where} names {len(files)} files; an item has one")
    window = [item.get(key) for key in _WINDOWS[kind]] if kind in _WINDOWS else _ALL
    return {"type": kind}, _media(kind, files[0], where, window) if files else None


def _media(kind: str, file: Any, where: str, window: list[Any]) -> Media:
    """Read what names a file: its path or content, or an object with these and, but for images, the seconds to use."""
    if isinstance(file, dict):
        refuse_unknown(file, _FILE_KEYS[kind], where)
        if kind in _WINDOWS:
            given = zip(window, _WINDOWS[kind], strict=True)
            window = [value if is_given(value) else file.get(key) for value, key in given]
        file = _location(file, where)
    start = end = None
    if window != _ALL:
        start, end = (_second(value, f"{where}.{key}") for value, key in zip(window, _WINDOWS[kind], strict=True))
    if end is not None and end <= (start or 0.0):
        raise unknown(f"{where} ends at second {end}, not after its start at {start or 0.0}")
    if not isinstance(file, bytes) and not expect(str, file, f"the path of {where}"):
        raise unknown(f"the path of {where} is empty")
    return Media(kind, file, start, end)


def _location(file: Row, where: str) -> Any:
    """Return the content of a file when the object has it, else its path."""
    if is_given(file.get("bytes")):
        return expect(bytes, file["bytes"], f"{where}.bytes")
    if is_given(file.get("data")):
        data, form = (expect(str, file.get(key), f"{where}.{key}") for key in ("data", "format"))
        return f"data:audio/{form};base64,{data}"
    return file["url"] if is_given(file.get("url")) else file.get("path")


def _second(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise unknown(f"{where} is {value!r}, not a second from 0 on")
    return float(value)

"""The rows of a JSON list, one after the other, with no more than a piece of the file in memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qvl_pipeline.data.sources.files.limits import Limits
from qvl_pipeline.errors import UserError

_SPACE = " \t\n\r"
_BUFFER_CHARS = 1 << 20
_OUTSIDE = re.compile(r'["{}\[\],]')
_IN_STRING = re.compile(r'"|\\.?', re.DOTALL)
# Numbers are not converted: only the end of a row is looked for.
_decode = json.JSONDecoder(parse_float=str, parse_int=str).raw_decode


def list_entries(file: BinaryIO, path: Path, limits: Limits) -> Iterator[tuple[bytes, str | None]]:
    """Yield every entry of a JSON list as it is written, whatever it is, as far as its end can be told.

    Args:
        file: The text.
        path: Its name, for messages.
        limits: How long an entry may be.

    Yields:
        The entry, and why it is not there when it is not.

    Raises:
        UserError: It is not a list.
        ValueError: The list is broken, or does not end.
    """
    # What is not UTF-8 is handed on as it is, and fails its row.
    text = _Text(io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape"), limits)
    if text.peek() != "[":
        raise UserError(f"'{path}' is not a list of rows: wrap its content in [ ], or set data_type: jsonl")
    text.position += 1
    separator = "["
    while separator != "]":
        if separator == "[" and text.peek() == "]":
            text.position += 1
            break
        entry = text.entry()
        yield (b"", limits.too_long()) if entry is None else (entry.encode(errors="surrogateescape"), None)
        separator = text.peek()
        if separator not in (",", "]"):
            raise ValueError(f"its rows are followed by {separator!r} instead of a comma or ]")
        text.position += 1
    if rest := text.peek():
        raise ValueError(f"the list is followed by {rest!r}")


class _Text:
    """A text that is read on where it must be, and forgotten where it is done with."""

    def __init__(self, file: io.TextIOBase, limits: Limits) -> None:
        self._file = file
        self._most = limits.row_bytes
        self._buffer = ""
        self.position = 0

    def peek(self) -> str:
        """Return the next character that is not blank; at the end of the text, nothing."""
        while True:
            while self.position < len(self._buffer):
                if self._buffer[self.position] not in _SPACE:
                    return self._buffer[self.position]
                self.position += 1
            if not self._read_on():
                return ""

    def entry(self) -> str | None:
        """Return the text of the value that comes next, sound or not; `None` of one that is too long."""
        if self.peek() in (",", "]", ""):
            raise ValueError(f"a row is not JSON, after '{self._buffer[self.position :][:50]}'")
        while (end := self._end()) is None:
            if len(self._buffer) - self.position > self._most:
                return self._leave_out()
            if not self._read_on():
                raise ValueError(f"a row is not JSON, after '{self._buffer[self.position :][:50]}'")
        found = self._buffer[self.position : end]
        self.position = end
        return found if len(found) <= self._most else None

    def _end(self) -> int | None:
        """Find where the value ends; `None` when that is not read yet."""
        try:
            _, end = _decode(self._buffer, self.position)
        except (json.JSONDecodeError, RecursionError):  # it is not all there, or not JSON
            return _End().find(self._buffer, self.position)
        # A number at the very end may go on.
        return end if end < len(self._buffer) or not self._read_on() else self._end()

    def _leave_out(self) -> None:
        """Read on up to the end of the value, and forget it on the way."""
        scan = _End()
        while (end := scan.find(self._buffer, self.position)) is None:
            self.position = len(self._buffer)
            if not self._read_on():
                raise ValueError("its last row does not end")
        self.position = end

    def _read_on(self) -> bool:
        # Doubling what is held keeps a long row from being scanned again for each piece of it.
        more = self._file.read(max(_BUFFER_CHARS, min(len(self._buffer) - self.position, self._most)))
        self._buffer = self._buffer[self.position :] + more
        self.position = 0
        return bool(more)


class _End:
    """Looks for the end of a value by its brackets and quotes, also where it is nested too deeply, or no JSON."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str, start: int) -> int | None:
        """Return where the value ends; `None` when it goes on after this text."""
        position = start + self._escaped
        self._escaped = False
        while match := (_IN_STRING if self._in_string else _OUTSIDE).search(text, position):
            token, position = match[0], match.end()
            if self._in_string:
                self._in_string = token != '"'
                self._escaped = token == "\\"
                if not self._in_string and self._depth == 0:
                    return position
            elif token == '"':
                self._in_string = True
            elif token in "{[":
                self._depth += 1
            elif self._depth == 0:  # after a number, or what stands in its place
                return match.start()
            elif token in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return position
        return None

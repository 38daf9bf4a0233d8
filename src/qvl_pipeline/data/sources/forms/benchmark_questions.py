"""What rows of published benchmarks ask, by the shape of their columns."""

from __future__ import annotations

import ast
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson

from qvl_pipeline.data.sources.forms.checked import Row, expect, unknown

Item = dict[str, Any]
_LETTERS = string.ascii_uppercase
_PLACE = re.compile(r"<image ([1-7])>")
_NO_ANSWERS = "name the split whose answers are published"


class Question(NamedTuple):
    """What a row asks.

    Attributes:
        content: Items of the user's turn: texts, and media with their files.
        said: What the assistant says where the answer is right; its loss is measured.
        expected: The column `answer`, in the form that the task scores by.
    """

    content: list[Item]
    said: str
    expected: str


def answered(row: Row, after: str, *, column: str, spelt: Callable[[str], str] = str) -> Question:
    """An image, a question and its answer, or a list of acceptable ones, of which the commonest is said."""
    value = row.get(column)
    answers = [expect(str, text, f"an item of '{column}'") for text in value] if isinstance(value, list) else []
    if not answers:
        answers = [read_text(row, column)]
    expected = _json(answers) if isinstance(value, list) or answers[0].startswith('["') else answers[0]
    said = Counter(answers).most_common(1)[0][0]
    return Question([_image(row, "image"), _say(spelt(read_text(row, "question")) + after)], said, expected)


def ai2d(row: Row, after: str) -> Question:
    """A diagram, a question and its options; the answer is the number of one, from 0 on."""
    options = _texts(row, "options")
    number = str(row.get("answer"))
    if not number.isdecimal() or int(number) >= len(options):
        raise unknown(f"'answer' is {number}, not the number of one of {len(options)} options, from 0 on")
    letter = _LETTERS[int(number)]
    asked = f"{read_text(row, 'question')}\n{_lettered(options)}{after}"
    return Question([_image(row, "image"), _say(asked)], letter, letter)


def mmmu(row: Row, of_choice: str, of_open: str) -> Question:
    """Images at their places in question and options; the answer an option's letter, or one of several texts."""
    options = [str(option) for option in _literal(row, "options")]
    answer = read_text(row, "answer")
    if read_text(row, "question_type") == "multiple-choice":
        if answer not in tuple(_LETTERS[: len(options)]):
            raise unknown(f"'answer' is '{answer}', and there are {len(options)} options: {_NO_ANSWERS}")
        asked, expected = f"{_lettered(options)}\n\n{of_choice}", {"answer": answer, "options": options}
    elif answer == "?":
        raise unknown(f"'answer' is '?': {_NO_ANSWERS}")
    else:
        answers = [str(text) for text in _literal(row, "answer")] if answer.startswith("['") else [answer]
        asked, expected, answer = f"\n{of_open}", {"answer": answers}, answers[0]
    content = list(_placed(row, f"{read_text(row, 'question')}\n{asked}"))
    return Question(content, answer, _json(expected))


def mathvista(row: Row, of_choice: str, of_kind: dict[tuple[str, int | None], str]) -> Question:
    """An image, and a question of which the form of the answer is told: an option, or a number or list of a kind."""
    kind, answer = read_text(row, "answer_type"), read_text(row, "answer")
    choices = _texts(row, "choices") if row.get("choices") else None
    precision = row.get("precision")
    digits = int(precision) if isinstance(precision, int | float) and kind == "float" else None
    if choices is None and (kind, digits) not in of_kind:
        raise unknown(f"its answer_type is '{kind}' with a precision of {digits}, for which there is no prompt")
    if choices is not None and answer not in choices:
        raise unknown("'answer' is none of 'choices'")
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    hint = of_kind[kind, digits] if choices is None else of_choice
    parts = [read_text(row, "question") + unit, *([_lettered(choices)] if choices else []), hint]
    expected = {"answer": answer, "answer_type": kind, "choices": choices, "precision": digits}
    said = answer if choices is None else _LETTERS[choices.index(answer)]
    return Question([_image(row, "decoded_image"), _say("\n".join(parts))], said, _json(expected))


def videomme(row: Row, before: str, after: str) -> Question:
    """A clip by its id, a question and its options."""
    options = "\n".join(_texts(row, "options"))  # which begin with their letters
    asked = f"{before}\n{read_text(row, 'question')}\n{options}\n{after}"
    return _clip_question(row, f"data/{read_text(row, 'videoID')}.mp4", asked)


def mlvu(row: Row, after: str) -> Question:
    """A clip by its path, and a question that ends with its options."""
    return _clip_question(row, read_text(row, "video_name"), read_text(row, "question") + after)


def _clip_question(row: Row, path: str, asked: str) -> Question:
    letter = read_text(row, "answer").strip()
    return Question([{"type": "video", "video": path}, _say(asked)], letter, letter)


def _placed(row: Row, text: str) -> Iterator[Item]:
    """Yield texts and images as they follow each other; where an image is named again, its name stays."""
    seen: set[str] = set()
    said = ""
    # Texts and numbers of images take turns in what `split` returns.
    for number, piece in enumerate(_PLACE.split(text)):
        if number % 2 == 0 or piece in seen:
            said += f"<image {piece}>" if number % 2 else piece
            continue
        seen.add(piece)
        yield from [_say(said.strip())] if said.strip() else []
        yield _image(row, f"image_{piece}")
        said = ""
    if said.strip():
        yield _say(said.strip())


def _lettered(options: list[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))


def _say(text: str) -> Item:
    return {"type": "text", "text": text}


def _image(row: Row, column: str) -> Item:
    if not is_file(row.get(column)):
        raise unknown(f"'{column}' holds no image (`bytes` and `path`, as Hugging Face datasets have them)")
    return {"type": "image", "image": row[column]}


def is_file(value: Any) -> bool:
    """Whether a value is a file as Hugging Face datasets embed it."""
    return isinstance(value, dict) and "bytes" in value


def read_text(row: Row, column: str) -> str:
    """Return the text of a column.

    Raises:
        RejectedRowError: There is none (`unknown_format`).
    """
    if row.get(column) in (None, []):
        raise unknown(f"it has no '{column}'" + f": {_NO_ANSWERS}" * column.startswith("answer"))
    return expect(str, row[column], f"'{column}'")


def _texts(row: Row, column: str) -> list[str]:
    return [expect(str, text, f"an item of '{column}'") for text in expect(list, row.get(column), f"'{column}'")]


def _literal(row: Row, column: str) -> list[Any]:
    """Read a list that the column holds as Python writes it."""
    try:
        return expect(list, ast.literal_eval(read_text(row, column)), f"'{column}'")
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise unknown(f"'{column}' is no list as Python writes it") from error


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()

"""Rows of published benchmarks, in the layout of their Hugging Face repositories, as what is asked and expected.

Prompts are those of lmms-eval's tasks, in the form that they have for any model.
"""

from __future__ import annotations

import ast
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import orjson

from qvl_pipeline.data.sources.forms.checked import Row, expect, unknown
from qvl_pipeline.kinds import BENCHMARK

Item = dict[str, Any]
_LETTERS = string.ascii_uppercase
_PLACE = re.compile(r"<image ([1-7])>")
_NO_ANSWERS = "name the split whose answers are published"
_FORM_COLUMNS = (
    "messages",
    "conversations",
    "system",
    "tools",
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
)


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


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark.

    Attributes:
        split: First word of the names of its files: the split whose scores people quote.
        task: Its score, a task of `evaluation`.
        ask: What a row asks.
        group: Column by whose values scores are given, too.
        subset: Folder of its files, in a repository that has several.
    """

    split: str
    task: str
    ask: Callable[[Row], Question]
    group: str = ""
    subset: str = ""

    def files(self, names: list[str]) -> list[str]:
        """Return those of a repository's files that hold the split; a file that is named itself may have any name."""
        inside = [name for name in names if name.startswith(f"{self.subset}/")] if self.subset else []
        last = {name: name.rpartition("/")[2] for name in inside or names}
        return [name for name, file in last.items() if not name or re.match(rf"{self.split}(?![a-z])", file)]


def benchmark_row(row: Row, name: str, source: str) -> Row:
    """Return a row of a benchmark as one in OpenAI's form.

    Args:
        row: Its published columns.
        name: Key of `BENCHMARKS`.
        source: Name of the source.

    Returns:
        `messages`, `kind`, `task` and `answer`, and those of its columns that are neither read nor media.

    Raises:
        RejectedRowError: A column is missing or of another type, or there is no answer (`unknown_format`).
    """
    benchmark = BENCHMARKS[name]
    question = benchmark.ask(row)
    group = f"/{_text(row, benchmark.group)}" if benchmark.group else ""
    turns = [{"role": "user", "content": question.content}, {"role": "assistant", "content": question.said}]
    rest = {key: value for key, value in row.items() if key not in _FORM_COLUMNS and not _is_file(value)}
    return rest | {
        "messages": turns,
        "kind": f"{BENCHMARK}{source}{group}",
        "task": benchmark.task,
        "answer": question.expected,
    }


def _answered(row: Row, after: str, *, column: str, spelt: Callable[[str], str] = str) -> Question:
    """An image, a question and its answer, or a list of acceptable ones, of which the commonest is said."""
    value = row.get(column)
    answers = [expect(str, text, f"an item of '{column}'") for text in value] if isinstance(value, list) else []
    if not answers:
        answers = [_text(row, column)]
    expected = _json(answers) if isinstance(value, list) or answers[0].startswith('["') else answers[0]
    said = Counter(answers).most_common(1)[0][0]
    return Question([_image(row, "image"), _say(spelt(_text(row, "question")) + after)], said, expected)


def _ai2d(row: Row, after: str) -> Question:
    options = _texts(row, "options")
    number = str(row.get("answer"))
    if not number.isdecimal() or int(number) >= len(options):
        raise unknown(f"'answer' is {number}, not the number of one of {len(options)} options, from 0 on")
    letter = _LETTERS[int(number)]
    asked = f"{_text(row, 'question')}\n{_lettered(options)}{after}"
    return Question([_image(row, "image"), _say(asked)], letter, letter)


def _mmmu(row: Row, of_choice: str, of_open: str) -> Question:
    """Images at their places in question and options; the answer an option's letter, or one of several texts."""
    options = [str(option) for option in _literal(row, "options")]
    answer = _text(row, "answer")
    if _text(row, "question_type") == "multiple-choice":
        if answer not in tuple(_LETTERS[: len(options)]):
            raise unknown(f"'answer' is '{answer}', and there are {len(options)} options: {_NO_ANSWERS}")
        asked, expected = f"{_lettered(options)}\n\n{of_choice}", {"answer": answer, "options": options}
    elif answer == "?":
        raise unknown(f"'answer' is '?': {_NO_ANSWERS}")
    else:
        answers = [str(text) for text in _literal(row, "answer")] if answer.startswith("['") else [answer]
        asked, expected, answer = f"\n{of_open}", {"answer": answers}, answers[0]
    content = list(_placed(row, f"{_text(row, 'question')}\n{asked}"))
    return Question(content, answer, _json(expected))


def _mathvista(row: Row, of_choice: str, of_kind: dict[tuple[str, int | None], str]) -> Question:
    kind, answer = _text(row, "answer_type"), _text(row, "answer")
    choices = _texts(row, "choices") if row.get("choices") else None
    precision = row.get("precision")
    digits = int(precision) if isinstance(precision, int | float) and kind == "float" else None
    if choices is None and (kind, digits) not in of_kind:
        raise unknown(f"its answer_type is '{kind}' with a precision of {digits}, for which there is no prompt")
    if choices is not None and answer not in choices:
        raise unknown("'answer' is none of 'choices'")
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    hint = of_kind[kind, digits] if choices is None else of_choice
    parts = [_text(row, "question") + unit, *([_lettered(choices)] if choices else []), hint]
    expected = {"answer": answer, "answer_type": kind, "choices": choices, "precision": digits}
    said = answer if choices is None else _LETTERS[choices.index(answer)]
    return Question([_image(row, "decoded_image"), _say("\n".join(parts))], said, _json(expected))


def _videomme(row: Row, before: str, after: str) -> Question:
    options = "\n".join(_texts(row, "options"))  # which begin with their letters
    asked = f"{before}\n{_text(row, 'question')}\n{options}\n{after}"
    return _clip_question(row, f"data/{_text(row, 'videoID')}.mp4", asked)


def _mlvu(row: Row, after: str) -> Question:
    """The question ends with its options, each with its letter."""
    return _clip_question(row, _text(row, "video_name"), _text(row, "question") + after)


def _clip_question(row: Row, path: str, asked: str) -> Question:
    letter = _text(row, "answer").strip()
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
    if not _is_file(row.get(column)):
        raise unknown(f"'{column}' holds no image (`bytes` and `path`, as Hugging Face datasets have them)")
    return {"type": "image", "image": row[column]}


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and "bytes" in value


def _text(row: Row, column: str) -> str:
    if row.get(column) in (None, []):
        raise unknown(f"it has no '{column}'" + f": {_NO_ANSWERS}" * column.startswith("answer"))
    return expect(str, row[column], f"'{column}'")


def _texts(row: Row, column: str) -> list[str]:
    return [expect(str, text, f"an item of '{column}'") for text in expect(list, row.get(column), f"'{column}'")]


def _literal(row: Row, column: str) -> list[Any]:
    """Read a list that the column holds as Python writes it."""
    try:
        return expect(list, ast.literal_eval(_text(row, column)), f"'{column}'")
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise unknown(f"'{column}' is no list as Python writes it") from error


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


_PHRASE = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
BENCHMARKS: dict[str, Benchmark] = {
    "chartqa": Benchmark(
        split="test",
        task="relaxed_accuracy",
        ask=partial(_answered, column="answer", after="\nAnswer the question with a single word."),
        group="type",
    ),
    "docvqa": Benchmark(
        split="validation", task="anls", ask=partial(_answered, column="answers", after=_PHRASE), subset="DocVQA"
    ),
    "textvqa": Benchmark(
        split="validation",
        task="vqa_accuracy",
        ask=partial(_answered, column="answers", after=_PHRASE, spelt=str.capitalize),
    ),
    "mmmu": Benchmark(
        split="validation",
        task="mmmu",
        ask=partial(_mmmu, of_choice=_LETTER.strip(), of_open=_PHRASE.strip()),
    ),
    "mathvista": Benchmark(
        split="testmini",
        task="mathvista",
        ask=partial(
            _mathvista,
            of_choice=_LETTER.strip(),
            of_kind={
                ("integer", None): "Answer the question using a single integer number.",
                ("float", 1): "Answer the question using a single floating-point number with one decimal place.",
                ("float", 2): "Answer the question using a single floating-point number with two decimal places.",
                ("list", None): "Answer the question using a Python list.",
            },
        ),
    ),
    "ai2d": Benchmark(split="test", task="ai2d", ask=partial(_ai2d, after=_LETTER)),
    "realworldqa": Benchmark(
        split="test", task="realworldqa", ask=partial(_answered, column="answer", after="", spelt=str.strip)
    ),
    "videomme": Benchmark(
        split="test",
        task="option_letter",
        ask=partial(
            _videomme,
            before="Select the best answer to the following multiple-choice question based on the video and the "
            "subtitles. Respond with only the letter (A, B, C, or D) of the correct option.",
            after=_LETTER,
        ),
        group="duration",
    ),
    "mlvu": Benchmark(
        split="test",
        task="mlvu",
        ask=partial(_mlvu, after="\nOnly give the best option.\nBest option: ("),
        group="task_type",
    ),
}

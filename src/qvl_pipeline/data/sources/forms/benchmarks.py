"""Rows of published benchmarks, in the layout of their Hugging Face repositories, as what is asked and expected.

Prompts are those of lmms-eval's tasks, in the form that they have for any model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qvl_pipeline.data.sources.forms.benchmark_questions import (
    Question,
    ai2d,
    answered,
    is_file,
    mathvista,
    mlvu,
    mmmu,
    read_text,
    videomme,
)
from qvl_pipeline.data.sources.forms.checked import Row
from qvl_pipeline.data.sources.forms.items import MEDIA_COLUMNS
from qvl_pipeline.kinds import BENCHMARK

# Names that the form would read, though they are other things here.
_FORM_COLUMNS = (
    "messages",
    "conversations",
    "system",
    "tools",
    *(name for names in MEDIA_COLUMNS.values() for name in names),
)


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark.

    Attributes:
        split: First word of the names of its files: the split whose scores people quote.
        task: Its score, a task of `evaluation`.
        ask: What a row asks.
        columns: Columns that it is read from, but for media; others are put aside.
        group: Column by whose values scores are given, too.
        subset: Folder of its files, in a repository that has several.
    """

    split: str
    task: str
    ask: Callable[[Row], Question]
    columns: tuple[str, ...]
    group: str = ""
    subset: str = ""

    def files(self, names: list[str]) -> list[str]:
        """Return those of a repository's files that hold the split; a file that is named itself may have any name."""
        inside = [name for name in names if name.startswith(f"{self.subset}/")] if self.subset else []
        last = {name: name.rpartition("/")[2] for name in inside or names}
        return [name for name, file in last.items() if not name or re.match(rf"{self.split}(?![a-z])", file)]


_PHRASE = "\nAnswer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
BENCHMARKS: dict[str, Benchmark] = {
    "chartqa": Benchmark(
        split="test",
        task="relaxed_accuracy",
        columns=("question", "answer"),
        ask=partial(answered, column="answer", after="\nAnswer the question with a single word."),
        group="type",
    ),
    "docvqa": Benchmark(
        split="validation",
        task="anls",
        columns=("question", "answers"),
        ask=partial(answered, column="answers", after=_PHRASE),
        subset="DocVQA",
    ),
    "textvqa": Benchmark(
        split="validation",
        task="vqa_accuracy",
        columns=("question", "answers"),
        ask=partial(answered, column="answers", after=_PHRASE, spelt=str.capitalize),
    ),
    "mmmu": Benchmark(
        split="validation",
        task="mmmu",
        columns=("question", "options", "answer", "question_type"),
        ask=partial(mmmu, of_choice=_LETTER.strip(), of_open=_PHRASE.strip()),
    ),
    "mathvista": Benchmark(
        split="testmini",
        task="mathvista",
        columns=("question", "unit", "choices", "answer", "answer_type", "precision"),
        ask=partial(
            mathvista,
            of_choice=_LETTER.strip(),
            of_kind={
                ("integer", None): "Answer the question using a single integer number.",
                ("float", 1): "Answer the question using a single floating-point number with one decimal place.",
                ("float", 2): "Answer the question using a single floating-point number with two decimal places.",
                ("list", None): "Answer the question using a Python list.",
            },
        ),
    ),
    "ai2d": Benchmark(
        split="test", task="ai2d", columns=("question", "options", "answer"), ask=partial(ai2d, after=_LETTER)
    ),
    "realworldqa": Benchmark(
        split="test",
        task="realworldqa",
        columns=("question", "answer"),
        ask=partial(answered, column="answer", after="", spelt=str.strip),
    ),
    "videomme": Benchmark(
        split="test",
        task="option_letter",
        columns=("videoID", "question", "options", "answer"),
        ask=partial(
            videomme,
            before="Select the best answer to the following multiple-choice question based on the video and the "
            "subtitles. Respond with only the letter (A, B, C, or D) of the correct option.",
            after=_LETTER,
        ),
        group="duration",
    ),
    "mlvu": Benchmark(
        split="test",
        task="mlvu",
        columns=("video_name", "question", "answer"),
        ask=partial(mlvu, after="\nOnly give the best option.\nBest option: ("),
        group="task_type",
    ),
}


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
    group = f"/{read_text(row, benchmark.group)}" if benchmark.group else ""
    turns = [{"role": "user", "content": question.content}, {"role": "assistant", "content": question.said}]
    read = {*benchmark.columns, benchmark.group, *_FORM_COLUMNS}
    rest = {key: value for key, value in row.items() if key not in read and not is_file(value)}
    return rest | {
        "messages": turns,
        "kind": f"{BENCHMARK}{source}{group}",
        "task": benchmark.task,
        "answer": question.expected,
    }

"""Random answers to benchmarks, with the words and marks on which implementations part; the same ones every time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

PAIRS = 1_000
_LETTERS = "ABCDE"
_CHOICE_WORDS = (
    *("A", "B", "C", "D", "E", "(A)", "(B)", "B.", "C)", "D:", "b", "(c)", "'B'", '"C"', "I", "FLAG", "Blue car", "İ"),
    *(
        "the answer is",
        "The best answer is",
        "I choose",
        "option is",
        "correct choice is",
        "Answer:",
        "答案是",
        "정답은",
    ),
    *("because", "red", "an apple", "and", "not", "\n"),
)
_VQA_WORDS = (
    *(
        "the",
        "a",
        "None",
        "two",
        "ten",
        "10.5",
        "1,000",
        "-3",
        "it's",
        "dont",
        "couldntve",
        "couldn'tve",
        "yall",
        "twas",
    ),
    *("somebody'd", "id've", "Im", "let's", "shes", "oclock", "'s", "U.S.A.", "and/or", "(x)", "[y]", "a-b", "@home"),
    *("red", "Blue", "-", "?", "!", "...", "\\", "_", "<b>", "x. " * 40),
)
_OPEN_WORDS = (
    *("so", "is", "the answer is", "Therefore", "=", "x = 3", "final", ":", "\n", ". A", "about", "result", "yes", "a"),
    *("3.14159", "1,234", "1e5", "-2", "12.0", ".5", "$6,000", "nan", "transformation"),
)
_OPTIONS = ("red", "Blue car", "an apple", "$5,000", "<image 1>", "not red", "3.5 m")


def pairs(task: str) -> list[tuple[str, str]]:
    """Return answers, without blanks around them, and what is expected, as the column `answer` has it."""
    rng = random.Random(task)
    return [TASKS[task](rng) for _ in range(PAIRS)]


def _said(rng: random.Random, words: tuple[str, ...], most: int = 5) -> str:
    parts = [
        rng.choice(words) + rng.choice([" ", " ", " ", "", "\n", "\t", ". ", ", "]) for _ in range(rng.randint(0, most))
    ]
    return ("".join(parts) + rng.choice(["", "", ".", "!", "'"])).strip()


def _letter(rng: random.Random) -> tuple[str, str]:
    return _said(rng, _CHOICE_WORDS), rng.choice("ABCD")


def _realworldqa(rng: random.Random) -> tuple[str, str]:
    wanted = rng.choice(["A", "b", "C ", "D", "0", "Downhill"])
    return rng.choice([_said(rng, _CHOICE_WORDS), wanted.upper().strip() + rng.choice(["", ".", "..", "!"])]), wanted


def _ai2d(rng: random.Random) -> tuple[str, str]:
    plain = rng.choice(_LETTERS) + rng.choice(["", ".", ")", ". leaf", ") leaf", " .", "\n", ".."])
    return rng.choice([plain, plain.lower(), f"({plain})", _said(rng, _CHOICE_WORDS)]).strip(), rng.choice("ABCD")


def _vqa_accuracy(rng: random.Random) -> tuple[str, str]:
    pool = [_said(rng, _VQA_WORDS, 3) for _ in range(rng.randint(1, 4))]
    people = [rng.choice(pool) for _ in range(rng.choice([10, 10, 10, 3, 1]))]
    return rng.choice([*pool, _said(rng, _VQA_WORDS)]), json.dumps(people)


def _mmmu(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        wanted = [rng.choice(_OPEN_WORDS) for _ in range(rng.choice([1, 1, 2]))]
        return _said(rng, _OPEN_WORDS, 6), json.dumps({"answer": wanted})
    options = [rng.choice(_OPTIONS) + rng.choice(["", " x"]) for _ in range(rng.choice([2, 4, 4, 5]))]
    told = rng.choice(["", f" {rng.choice(options).upper()}", f" I think that it is the {rng.choice(options)}"])
    wanted = _LETTERS[rng.randrange(len(options))]
    return (_said(rng, _CHOICE_WORDS) + told).strip(), json.dumps({"answer": wanted, "options": options})


def _mathvista(rng: random.Random) -> tuple[str, str]:
    """Bare values only: others are taken out of the response by a language model, there."""
    kind = rng.choice(["text", "integer", "float", "list"])
    question: dict[str, Any] = {"answer_type": kind, "choices": None, "precision": None}
    number = round(rng.uniform(-5, 50), rng.randint(0, 4))
    if kind == "text":
        question["choices"] = [rng.choice(_OPTIONS) + str(place) for place in range(rng.randint(2, 5))]
        answer, wanted = rng.choice(question["choices"]), rng.choice(question["choices"])
    elif kind == "integer":
        answer, wanted = rng.choice([str(int(number)), f"+{abs(int(number))}", str(int(number) + 1)]), str(int(number))
    elif kind == "float":
        question["precision"] = rng.choice([1, 2])
        answer, wanted = rng.choice([str(number), f"{number:.1f}", "1e1"]), f"{number:.{question['precision']}f}"
    else:
        answer, wanted = rng.choice(["[1, 2]", "[1,2]", "[2007, 2008]"]), "[1, 2]"
    return answer, json.dumps({"answer": wanted, **question})


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "option_letter": _letter,
    "realworldqa": _realworldqa,
    "ai2d": _ai2d,
    "vqa_accuracy": _vqa_accuracy,
    "mmmu": _mmmu,
    "mathvista": _mathvista,
}

"""MathVista (Lu et al. 2024): the authors' normalisation and comparison, without a model that extracts.

The authors, and lmms-eval, let GPT find the answer in a response unless it is the bare value. Here rules do.
"""

from __future__ import annotations

import json
import re
import string
from typing import Any

from rapidfuzz.distance import Levenshtein

from qvl_pipeline.evaluation.benchmarks.choices import chosen_option

_LETTER_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
_LIST = re.compile(r"\[[^\[\]]*\]")


def mathvista(answer: str, expected: str) -> float:
    """Score an answer to a question of MathVista.

    Args:
        answer: The answer.
        expected: JSON object: `answer`, `answer_type` (`text`, `integer`, `float`, `list`), `choices` (texts of the
            options, or null) and `precision` (digits of a float, or null).
    """
    question = json.loads(expected)
    given = _normalised(_extracted(answer.strip(), question), question)
    return float(given is not None and given.strip() == question["answer"].strip())


def _extracted(answer: str, question: dict[str, Any]) -> str:
    """Take the answer out of a response: the bare value, what is quoted, else the option or the last number or list."""
    kind, choices = question["answer_type"], question["choices"]
    if choices and answer in choices:
        return answer
    if kind in ("integer", "float"):
        try:
            return str(int(answer) if kind == "integer" else float(answer))
        except ValueError:
            pass
    if quoted := _QUOTED.search(answer):
        return quoted[1]
    if choices:
        return chosen_option(answer, string.ascii_uppercase[: len(choices)], anywhere=False) or answer
    found = (_LIST if kind == "list" else _NUMBER).findall(_THOUSANDS.sub("", answer))
    return found[-1] if found else answer


def _normalised(value: str, question: dict[str, Any]) -> str | None:
    """Return a value in the form of the dataset's answers; `None` where it has none."""
    kind, choices = question["answer_type"], question["choices"]
    if choices:
        in_brackets = _LETTER_IN_BRACKETS.search(value)
        value = in_brackets[1].upper() if in_brackets else value.strip()
        if value in tuple(string.ascii_uppercase[: len(choices)]):
            return choices[ord(value) - ord("A")]
        return min(choices, key=lambda choice: Levenshtein.distance(value, choice))
    try:
        if kind == "integer":
            return str(int(float(value)))
        return str(round(float(value), int(question["precision"]))) if kind == "float" else value
    except (ValueError, TypeError, OverflowError):
        return None

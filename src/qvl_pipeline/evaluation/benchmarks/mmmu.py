"""MMMU (Yue et al. 2024): options and open answers, by the rules of the authors' script, which lmms-eval took over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_MARKS = ",.!?;:'"
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
# What an open answer stands behind; in the last line also an equals sign.
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NO_ANSWER = tuple(":,.!?;'")
_FEWEST_WORDS = 6  # of an answer in which the text of an option is looked for


def mmmu(answer: str, expected: str) -> float:
    """Score an answer to a question of MMMU.

    Args:
        answer: The answer.
        expected: JSON object: `answer`, an option's letter or a list of acceptable texts, and for a letter `options`.
    """
    question = json.loads(expected)
    if options := question.get("options"):
        texts = dict(zip(map(chr, range(ord("A"), ord("A") + len(options))), options, strict=True))
        return float(_chosen(answer, texts) == question["answer"])
    wanted = [value for text in question["answer"] for value in _values(text)]
    return float(any(_is_in(value, wanted) for value in _open_values(answer)))


def _chosen(answer: str, texts: Mapping[str, str]) -> str | None:
    """Return the letter of the option: the last in brackets, else by itself, before a full stop, or by its text."""
    for mark in _MARKS:
        answer = answer.strip(mark)
    answer = f" {answer} "
    lower = answer.lower()
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in texts if form.format(letter) in answer]:
            return max(found, key=lambda letter: answer.rfind(place.format(letter)))
    found = [letter for letter, text in texts.items() if text.lower() in lower]
    if not found or len(answer.split()) < _FEWEST_WORDS:
        return None  # the original draws one
    return max(found, key=lambda letter: lower.rfind(texts[letter].lower()))


def _open_values(answer: str) -> set[str | float]:
    """Return what an open answer may mean: its key parts, and the numbers in them."""
    parts = list(_key_parts(answer.strip().strip(".").lower())) or [answer.strip().strip(".").lower()]
    numbers = [number for part in parts for form in _NUMBERS for number in form.findall(part)]
    return {value for text in (*parts, *numbers) for value in _values(text)}


def _key_parts(answer: str) -> Iterator[str]:
    """Yield of each line the shortest text behind an indicator."""
    lines = answer.split("\n")
    for number, line in enumerate(lines, start=1):
        indicators = (*_INDICATORS, "=") if number == len(lines) else _INDICATORS
        shortest = ""
        for indicator in indicators:
            _, there, behind = line.rpartition(indicator)
            if there and (not shortest or len(behind.strip()) < len(shortest)):
                shortest = behind.strip()
        if shortest and shortest not in _NO_ANSWER:
            yield shortest


def _values(text: str) -> list[str | float]:
    """Return a number rounded to two digits, or the text in small letters, a single letter with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _is_in(value: str | float, wanted: list[Any]) -> bool:
    """Tell whether a number is among the wanted values, or a text holds one of them."""
    if isinstance(value, float):
        return value in wanted
    return any(isinstance(text, str) and text in value for text in wanted)

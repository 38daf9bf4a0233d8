"""Which option of a question an answer chooses, by the rules of lmms-eval, and the scores that go by it."""

from __future__ import annotations

import re
import string

# How an option is written, the surest form last: the letter, and what is around it.
_FORMS = ("{} ", "{})", "{}:", "{}.", "({})")
# What introduces an option.
_PHRASES = (
    *(f"{which}{what} is" for what in ("answer", "option", "choice") for which in ("the correct ", "correct ")),
    *(f"{which}{what} is" for what in ("answer", "option") for which in ("the best ", "best ")),
    *("the answer is", "answer is", "my answer is", "the choice is", "choice is", "my choice is"),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_MARKS = ",.!?;:'\""
_LETTERS = "ABCD"
_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def chosen_option(answer: str, letters: str = _LETTERS, *, anywhere: bool = True) -> str:
    """Return the option that an answer chooses, as lmms-eval's `extract_mcq_answer` does.

    The surest sign counts, and of several such the last: a letter at the beginning, at the end, after what introduces
    an answer, then `(A)`, `A.`, `A:`, `A)` and `A `.

    Args:
        answer: The answer.
        letters: Letters of the options, as capitals.
        anywhere: Take a letter inside of a word, too, where there is no other.

    Returns:
        Its letter; empty where there is none.
    """
    text = answer.strip()
    for mark in _MARKS:
        text = text.strip(mark)
    if not text:
        return ""
    text, bare, lower = f" {text} ", text.strip(), f" {text} ".lower()
    found: list[tuple[int, int, str]] = []  # how sure, where, which
    for letter in letters:
        for sure, form in enumerate(_FORMS):
            found.append((sure, text.rfind(form.format(letter)), letter))
        for phrase in _PHRASES:
            if (at := lower.find(phrase)) >= 0:
                found.append((len(_FORMS), text.find(letter, at + len(phrase)), letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((len(_FORMS) + 1, len(text), letter))
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((len(_FORMS) + 2, 0, letter))
        if anywhere:
            found.append((-1, text.rfind(letter), letter))
    there = [(sure, at, letter) for sure, at, letter in found if at >= 0]
    return max(there, key=lambda candidate: candidate[:2])[2] if there else ""


def option_letter(answer: str, expected: str) -> float:
    """Tell whether the option chosen, of A to D, is the expected one: Video-MME and MLVU in lmms-eval."""
    return float(chosen_option(answer) == expected)


def realworldqa(answer: str, expected: str) -> float:
    """RealWorldQA in lmms-eval: the option chosen, or the text up to case and a full stop behind it."""
    wanted = expected.strip()
    if wanted.upper() in tuple(_LETTERS):
        return float(chosen_option(answer) == wanted.upper())
    return float(answer.lower().strip().rstrip(".") == wanted.lower())


def ai2d(answer: str, expected: str) -> float:
    """AI2D in lmms-eval: the letter before a full stop at the beginning, else all of the answer, is the expected one.

    Up to case and ASCII punctuation: `(b)` is B, and `B) leaf` is not.
    """
    leading = _LEADING_LETTER.match(answer)
    texts = (leading[1] if leading else answer.strip(), expected)
    given, wanted = (text.lower().translate(_PUNCTUATION) for text in texts)
    return float(given == wanted)

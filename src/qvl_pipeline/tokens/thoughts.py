"""Thoughts of an assistant: how they are written before an answer, and what is an answer without them."""

from __future__ import annotations

import re

_OPENED = re.compile(r"<think>\s*\Z")
_EMPTY = re.compile(r"<think>\s*</think>\s*")


def thought(text: str) -> str:
    """Return a thought as Qwen's templates write it before the answer."""
    return f"<think>\n{text.strip()}\n</think>\n\n"


def without_thoughts(text: str) -> str:
    """Return what is said behind the last thought, which may have begun before the text."""
    return text.rpartition("</think>")[2].lstrip("\n") if "</think>" in text else text


def prompt_of(prompt: str, answered: str) -> str:
    """Return the prompt that an answer was given to: with thinking on, or off.

    Templates open the thought in the prompt, or write an empty one there where thinking is off. Which of them a
    template does by default says nothing of a conversation.

    Args:
        prompt: The prompt as the template renders it by default.
        answered: The same conversation with the answer.
    """
    if answered.startswith(prompt):
        return prompt
    bare = re.sub(rf"{_EMPTY.pattern}\Z", "", prompt)
    opened = re.match(r"<think>\n", answered[len(bare) :])
    return bare + opened[0] if bare != prompt and answered.startswith(bare) and opened else prompt


def behind_empty_thought(text: str, start: int) -> int:
    """Return where an answer begins before which there is an empty thought, as a model gets it that is not to think.

    Args:
        text: Rendered conversation.
        start: Where the prompt ends; it may have opened the thought.

    Returns:
        The end of the empty thought; `start` where there is none.
    """
    opened = _OPENED.search(text, 0, start)
    empty = _EMPTY.match(text, opened.start() if opened else start)
    return max(start, empty.end()) if empty else start

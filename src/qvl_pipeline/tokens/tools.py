"""Whether a chat template renders the tools of a conversation: many leave them out without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qvl_pipeline.tokens.unusable import UnusableSampleError

Turns = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


def refuse_left_out_tools(
    name: str, turns: Turns, tools: Tools, text: str, render: Callable[[Turns, Tools], str]
) -> None:
    """Refuse a conversation of which the template leaves out tools, calls or results.

    What is left out is what changes nothing when it is taken away.

    Args:
        name: Sample id.
        turns: The turns.
        tools: Tools that they may use.
        text: The rendered conversation.
        render: Renders another one.

    Raises:
        UnusableSampleError: Something is left out (`tools_not_rendered`).
    """
    for what, fewer_turns, fewer_tools in _without(turns, tools):
        try:
            rendered = render(fewer_turns, fewer_tools)
        except UnusableSampleError:  # it minds that they are gone
            continue
        if rendered == text:
            refusal = f"the chat template leaves out {what}: use a model whose template renders tools"
            raise UnusableSampleError(name, "tools_not_rendered", refusal)


def _without(turns: Turns, tools: Tools) -> Iterator[tuple[str, Turns, Tools]]:
    """Yield the conversation without each of its parts, which is named."""
    if tools:
        yield "the tools", turns, None
    for number, turn in enumerate(turns):
        if turn.get("tool_calls"):
            plain = {key: value for key, value in turn.items() if key != "tool_calls"}
            yield f"the tool calls of turn {number}", [*turns[:number], plain, *turns[number + 1 :]], tools
        if turn["role"] == "tool":
            yield f"the result in turn {number}", [*turns[:number], *turns[number + 1 :]], tools

"""Conversations as text, with the parts of it that the assistant says."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import ProcessorMixin

from qvl_pipeline.families.tokens import END_OF_TEXT, END_OF_TURN
from qvl_pipeline.tokens.control import mark_written
from qvl_pipeline.tokens.thoughts import behind_empty_thought, prompt_of
from qvl_pipeline.tokens.tools import Tools, Turns, refuse_left_out_tools
from qvl_pipeline.tokens.unusable import UnusableSampleError

# What is said of a turn, or of the whole conversation at its first, and is not for the template to see.
_NOT_OF_A_TURN = ("tools", "trained")


class _Chat(NamedTuple):
    """What a template is given. `name` is the sample id, `trained` whether each turn is trained on."""

    name: str
    turns: Turns
    tools: Tools
    trained: list[bool]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        name: What to call it in an error: the sample id.
        text: The rendered chat template, with marks where texts hold what could be a control token (`tokens.control`).
        answers: Half-open character ranges of the assistant turns: content, tool calls and end token. A plain text is
            one answer.
        trained: Whether each of them is trained on.
    """

    name: str
    text: str
    answers: list[tuple[int, int]]
    trained: list[bool]


def render_chats(
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    names: Sequence[str],
    *,
    ignore_empty_think: bool = True,
) -> list[RenderedChat]:
    """Render conversations and find their assistant turns.

    A turn is found by rendering the conversation up to it: what follows "everything before, and the generation prompt"
    is the answer. The words of the text play no part, so a user may write "assistant", or the very tokens that open a
    turn.

    Args:
        processor: Processor with the chat template.
        conversations: Messages of each conversation, as `samples` has them.
        names: Their sample ids.
        ignore_empty_think: An empty thought before an answer belongs to what the answer was given to.

    Returns:
        The rendered conversations. Turns that are not trained on, and that the template renders in another way once the
        conversation goes on, are no answers.

    Raises:
        UnusableSampleError: The template refuses a conversation, renders its beginning in another way than the whole,
            nothing before an answer, or not its tools, or no assistant turn is trained on. The message names the
            sample.
    """
    chats = [_chat(name, messages) for name, messages in zip(names, conversations, strict=True)]
    spoken = [chat for chat in chats if not _is_plain_text(chat)]
    rendered = iter(_render_spoken(processor, spoken, ignore_empty_think))
    return [_plain_text(chat) if _is_plain_text(chat) else next(rendered) for chat in chats]


def _chat(name: str, messages: Sequence[Mapping[str, Any]]) -> _Chat:
    turns = [{key: value for key, value in turn.items() if key not in _NOT_OF_A_TURN} for turn in messages]
    tools = messages[0].get("tools") if messages else None
    trained = [turn.get("trained", True) for turn in messages]
    return _Chat(name, mark_written(turns), mark_written(tools), trained)


def _is_plain_text(chat: _Chat) -> bool:
    return [turn["role"] for turn in chat.turns] == ["text"]


def _plain_text(chat: _Chat) -> RenderedChat:
    """A text as it is, with the token that ends texts: there is no template for it, and nothing to answer."""
    text = "".join(item["text"] for item in chat.turns[0]["content"]) + END_OF_TEXT
    return RenderedChat(chat.name, text, [(0, len(text))], [True])


def prompts_of_turns(
    processor: ProcessorMixin, messages: Sequence[Mapping[str, Any]], name: str
) -> list[tuple[int, list[int]]]:
    """Divide a conversation whose earlier turns the template renders in another way once it goes on.

    Thinking models are served with earlier thoughts left out: each answer was given to a prompt of its own.

    Args:
        processor: Processor with the chat template.
        messages: The conversation, as `samples` has it.
        name: Its sample id.

    Returns:
        Of each prompt, in order, how many turns it has, and which of them are trained on there. All turns of the
        assistant that the template leaves as they were stay together, so it is one for most conversations; and for
        those that cannot be rendered at all, of which `render_chats` will say why.

    Raises:
        UnusableSampleError: The template refuses it.
    """
    chat = _chat(name, messages)
    left = [n for n, turn in enumerate(chat.turns) if turn["role"] == "assistant" and chat.trained[n]]
    whole, prompts = len(chat.turns), []
    while left:
        rendered = _render_spoken_turns(processor, _first(chat, whole), left)
        fitting = [n for n, found in zip(left, rendered, strict=True) if found]
        if not prompts and len(fitting) < len(left) and whole > left[-1] + 1:
            whole = left[-1] + 1  # what is asked last, and not answered, may be what makes the template leave out more
            continue
        if not fitting:
            return [(len(chat.turns), left)]
        prompts.append((whole, fitting))
        left = [n for n in left if n not in fitting]
        whole = left[-1] + 1 if left else 0
    return prompts[::-1]


def _render_spoken_turns(processor: ProcessorMixin, chat: _Chat, turns: Sequence[int]) -> list[bool]:
    """Say of some turns of the assistant whether the template leaves them in the whole as they were when given."""
    [text] = _render(processor, [chat])
    prompts = _render(processor, [_first(chat, number) for number in turns], generate=True)
    answered = _render(processor, [_first(chat, number + 1) for number in turns])
    return [
        text.startswith(given) and given.startswith(prompt_of(prompt, given))
        for prompt, given in zip(prompts, answered, strict=True)
    ]


def _render_spoken(processor: ProcessorMixin, chats: Sequence[_Chat], ignore_empty_think: bool) -> list[RenderedChat]:
    turns = [
        (owner, number)
        for owner, chat in enumerate(chats)
        for number, turn in enumerate(chat.turns)
        if turn["role"] == "assistant"
    ]
    texts = _render(processor, chats)
    prompts = _render(processor, [_first(chats[owner], number) for owner, number in turns], generate=True)
    inner = [(owner, number) for owner, number in turns if number + 1 < len(chats[owner].turns)]
    answered = _render(processor, [_first(chats[owner], number + 1) for owner, number in inner])
    beginnings = dict(zip(inner, answered, strict=True))
    rendered = [RenderedChat(chat.name, text, [], []) for chat, text in zip(chats, texts, strict=True)]
    last = dict(turns)
    for (owner, number), prompt in zip(turns, prompts, strict=True):
        beginning = beginnings.get((owner, number), texts[owner])
        is_trained, is_last = chats[owner].trained[number], number == last[owner]
        if not is_trained and not is_last and not texts[owner].startswith(beginning):
            continue
        start, end = _answer_range(rendered[owner], prompt_of(prompt, beginning), beginning)
        start = behind_empty_thought(texts[owner], start) if ignore_empty_think else start
        rendered[owner].answers.append((start, end))
        rendered[owner].trained.append(is_trained)
    for chat, found in zip(chats, rendered, strict=True):
        if not any(found.trained):
            raise UnusableSampleError(chat.name, "nothing_to_train", "it has no assistant turn to train on")
        _check_tools(processor, chat, found.text)
    return rendered


def _first(chat: _Chat, number: int) -> _Chat:
    """The first turns of a conversation."""
    return chat._replace(turns=chat.turns[:number])


def _check_tools(processor: ProcessorMixin, chat: _Chat, text: str) -> None:
    def render(turns: Turns, tools: Tools) -> str:
        return _render(processor, [chat._replace(turns=turns, tools=tools)])[0]

    refuse_left_out_tools(chat.name, chat.turns, chat.tools, text, render)


def _answer_range(chat: RenderedChat, prompt: str, answered: str) -> tuple[int, int]:
    """Characters of one answer, given the text up to it and the text up to its end."""
    if not (chat.text.startswith(answered) and answered.startswith(prompt)):
        raise UnusableSampleError(
            chat.name,
            "template_rewrites",
            "the chat template renders the beginning of the conversation in another way than the whole, also where a "
            "turn has a prompt of its own (model.thinking), so the tokens to train on cannot be found; use a template "
            "that does not rewrite earlier turns",
        )
    if not prompt:
        raise UnusableSampleError(
            chat.name,
            "answer_not_marked",
            "the chat template renders nothing before the answer, so there is no token that could predict its first; "
            "use a template that opens the assistant's turn, as ChatML does",
        )
    end = answered.rfind(END_OF_TURN, len(prompt))
    if end < 0:
        unclosed = f"the chat template does not close the assistant's turn by {END_OF_TURN}"
        raise UnusableSampleError(chat.name, "answer_not_marked", unclosed)
    return len(prompt), end + len(END_OF_TURN)


def _render(processor: ProcessorMixin, chats: Sequence[_Chat], *, generate: bool = False) -> list[str]:
    """Render conversations; those that have the same tools, most often none, by one call."""
    alike: dict[str, list[int]] = defaultdict(list)
    for number, chat in enumerate(chats):
        alike[json.dumps(chat.tools) if chat.tools else ""].append(number)
    texts = [""] * len(chats)
    for numbers in alike.values():
        rendered = _render_alike(processor, [chats[number] for number in numbers], generate=generate)
        for number, text in zip(numbers, rendered, strict=True):
            texts[number] = text
    return texts


def _render_alike(processor: ProcessorMixin, chats: Sequence[_Chat], *, generate: bool) -> list[str]:
    conversations = [list(chat.turns) for chat in chats]
    try:
        return processor.apply_chat_template(conversations, tools=chats[0].tools, add_generation_prompt=generate)
    except Exception as error:  # a template is a program that runs on data: it may fail in any way
        if len(chats) == 1:
            refusal = f"the chat template refuses it: {' '.join(str(error).split())}"
            raise UnusableSampleError(chats[0].name, "template_refusal", refusal) from error
    # One of many was refused; alone, it is refused by name.
    return [text for chat in chats for text in _render_alike(processor, [chat], generate=generate)]

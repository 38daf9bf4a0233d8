"""Conversations as text, with the parts of it that the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin

from qvl_pipeline.families.tokens import END_OF_TURN
from qvl_pipeline.tokens.control import mark_written
from qvl_pipeline.tokens.unusable import UnusableSampleError

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        name: What to call it in an error: the sample id.
        text: The rendered chat template, with marks where texts hold what could be a control token (`tokens.control`).
        answers: Half-open character ranges of the assistant turns: content and end token.
    """

    name: str
    text: str
    answers: list[tuple[int, int]]


def render_chats(
    processor: ProcessorMixin, conversations: Sequence[Conversation], names: Sequence[str]
) -> list[RenderedChat]:
    """Render conversations and find their assistant turns.

    A turn is found by rendering the conversation up to it: what follows "everything before, and the generation prompt"
    is the answer. The words of the text play no part, so a user may write "assistant", or the very tokens that open a
    turn.

    Args:
        processor: Processor with the chat template.
        conversations: Messages of each conversation.
        names: Their sample ids.

    Returns:
        The rendered conversations.

    Raises:
        UnusableSampleError: The template refuses a conversation, renders its beginning in another way than the whole,
            or nothing before an answer, or the conversation has no assistant turn. The message names the sample.
    """
    conversations = [mark_written(chat) for chat in conversations]
    turns = [
        (owner, number)
        for owner, chat in enumerate(conversations)
        for number, message in enumerate(chat)
        if message["role"] == "assistant"
    ]
    texts = _render(processor, conversations, names)
    before = [conversations[owner][:number] for owner, number in turns]
    prompts = _render(processor, before, [names[owner] for owner, _ in turns], generate=True)
    inner = [(owner, number) for owner, number in turns if number + 1 < len(conversations[owner])]
    answered = [conversations[owner][: number + 1] for owner, number in inner]
    beginnings = dict(zip(inner, _render(processor, answered, [names[owner] for owner, _ in inner]), strict=True))
    chats = [RenderedChat(name, text, []) for name, text in zip(names, texts, strict=True)]
    for (owner, number), prompt in zip(turns, prompts, strict=True):
        beginning = beginnings.get((owner, number), texts[owner])
        chats[owner].answers.append(_answer_range(chats[owner], prompt, beginning))
    for chat in chats:
        if not chat.answers:
            raise UnusableSampleError(chat.name, "nothing_to_train", "it has no assistant turn to train on")
    return chats


def _answer_range(chat: RenderedChat, prompt: str, answered: str) -> tuple[int, int]:
    """Characters of one answer, given the text up to it and the text up to its end."""
    if not (chat.text.startswith(answered) and answered.startswith(prompt)):
        raise UnusableSampleError(
            chat.name,
            "template_rewrites",
            "the chat template renders the beginning of the conversation in another way than the whole, so the tokens "
            "to train on cannot be found; use a template that does not rewrite earlier turns",
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


def _render(
    processor: ProcessorMixin, conversations: Sequence[Conversation], names: Sequence[str], *, generate: bool = False
) -> list[str]:
    if not conversations:
        return []
    try:
        return processor.apply_chat_template(list(conversations), add_generation_prompt=generate)
    except Exception as error:  # a template is a program that runs on data: it may fail in any way
        if len(conversations) == 1:
            refusal = f"the chat template refuses it: {' '.join(str(error).split())}"
            raise UnusableSampleError(names[0], "template_refusal", refusal) from error
    # One of many was refused; alone, it is refused by name.
    pairs = zip(conversations, names, strict=True)
    return [text for chat, name in pairs for text in _render(processor, [chat], [name], generate=generate)]

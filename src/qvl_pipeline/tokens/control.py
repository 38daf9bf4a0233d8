"""Control tokens: what builds a prompt, and how a text that holds the same characters is kept from being one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qvl_pipeline.families.tokens import CONTROL_TOKENS

# One of Unicode's noncharacters, which texts are not exchanged with. Behind a `<`, it says that a person wrote that.
_MARK = "\ufdd0"
_WRITTEN = f"<{_MARK}"
# Wherever a control token could begin: also at the end of a text, as the next one may hold the rest of the token.
_OPENING = re.compile(rf"<(?=[|{_MARK}]|\Z)")
_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))

Tokens = tuple[np.ndarray, np.ndarray]


def mark_written(value: Any) -> Any:
    """Mark, in all texts of a JSON value, every `<` that could begin a control token once texts are joined."""
    if isinstance(value, str):
        return _OPENING.sub(_WRITTEN, value) if "<" in value else value
    if isinstance(value, dict):
        return {mark_written(key): mark_written(part) for key, part in value.items()}
    return [mark_written(part) for part in value] if isinstance(value, list) else value


def without_marks(text: str) -> str:
    """Return a text as it was written."""
    return text.replace(_WRITTEN, "<")


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokens]:
    """Tokenise rendered texts; of what is marked, no control token is made.

    Args:
        tokenizer: The model's tokenizer, a fast one.
        texts: Rendered conversations, with marks.

    Returns:
        Of each text its token ids `[T]`, and where each token begins and ends in the text, marks counted, `[T, 2]`.
        Texts without marks are tokenised as they are. Of the others, what is between two control tokens is tokenised by
        itself, as the tokenizer would: other ids come out only where a control token is written in a text.
    """
    plain = [text for text in texts if _WRITTEN not in text]
    encodings = iter(tokenizer(plain, return_attention_mask=False).encodings) if plain else iter(())
    return [_encode_marked(tokenizer, text) if _WRITTEN in text else _tokens(next(encodings)) for text in texts]


def _tokens(encoding: Any) -> Tokens:
    return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _encode_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    ids, offsets, begin = [], [], 0
    for control in [*_CONTROL.finditer(text), None]:
        end = control.start() if control else len(text)
        if begin < end:
            piece_ids, piece_offsets = _encode_written(tokenizer, text[begin:end])
            ids.append(piece_ids)
            offsets.append(piece_offsets + begin)
        if control:
            ids.append(np.array([tokenizer.convert_tokens_to_ids(control[0])], dtype=np.int32))
            offsets.append(np.array([control.span()]))
            begin = control.end()
    return np.concatenate(ids), np.concatenate(offsets)


def _encode_written(tokenizer: PreTrainedTokenizerBase, marked: str) -> Tokens:
    """Tokenise a text that holds no control token but those that are written in it."""
    text = without_marks(marked)
    holds_control = _CONTROL.search(text) is not None
    [encoding] = tokenizer([text], add_special_tokens=False, split_special_tokens=holds_control).encodings
    ids, offsets = _tokens(encoding)
    # Places in `text` of the characters behind a mark, from which on places in `marked` are one further.
    behind = np.array([match.start() - number + 1 for number, match in enumerate(re.finditer(_WRITTEN, marked))])
    starts = offsets[:, 0] + np.searchsorted(behind, offsets[:, 0], side="right")
    ends = offsets[:, 1] + np.searchsorted(behind, offsets[:, 1] - 1, side="right")
    return ids, np.stack([starts, ends], axis=1)

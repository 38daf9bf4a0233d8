"""Work of training on samples, in tokens of the language model: what packs are balanced by.

All functions take arrays `[N]` or plain numbers.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Numbers = TypeVar("Numbers", np.ndarray, float)

# Work of the vision tower on one patch, in tokens of the language model: its parameters are about a tenth of an 8B
# model's, so a patch costs about a tenth of a token.
PATCH_COST = 0.1
# Tokens at which causal attention costs as much as all matrix products of a decoder layer: with hidden size H the
# products take 24 * H**2 FLOPs a token and attention over T tokens 2 * H * T, which is equal at 12 * H; H is 4096.
ATTENTION_TOKENS = 49_152


def llm_cost(lengths: Numbers) -> Numbers:
    """Work of the language model on samples of `lengths` tokens; attention makes it grow faster than their length."""
    return lengths * (1 + lengths / ATTENTION_TOKENS)


def vision_cost(patches: Numbers) -> Numbers:
    """Work of the vision tower on samples of `patches` patches."""
    return PATCH_COST * patches


def work_of(lengths: Numbers, patches: Numbers) -> Numbers:
    """Work of language model and vision tower together on samples of `lengths` tokens and `patches` patches."""
    return llm_cost(lengths) + vision_cost(patches)

"""The error that is the user's to mend: shown as one sentence, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the data, the parameters or the environment is wrong; the message says what, where, what to do."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return the hint `did you mean 'train'?` with the name in `known` that is nearest, or `otherwise`."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{nearest[0]}'?" if nearest else otherwise

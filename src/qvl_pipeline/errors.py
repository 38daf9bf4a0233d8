"""The error that is the user's to mend: shown as one sentence, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something in the data, the parameters or the environment is wrong; the message says what, where, what to do."""

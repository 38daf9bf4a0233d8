"""What to say about a row that is in no known form: which forms there are, and which is the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qvl_pipeline.data.rejection import RejectedRowError
from qvl_pipeline.data.sources.forms.checked import Row, unknown

_FORMS = (
    "known forms are openai (messages: role, content), sharegpt and llava (conversations: from, value), alpaca "
    "(instruction, input, output) and, if the source says `format: text`, a plain `text`"
)
# Columns of other forms, with what makes a known one of them.
_RENAMED = (
    ({"prompt", "completion"}, "rename them to 'instruction' and 'output'"),
    ({"prompt", "response"}, "rename them to 'instruction' and 'output'"),
    ({"question", "answer"}, "rename 'question' to 'instruction' and write the answer into 'output'"),
    ({"text"}, "say `format: text` of the source if it is a text to train on as a whole"),
)
_MOST_COLUMNS = 8


def no_form(row: Row, known: Sequence[str]) -> RejectedRowError:
    """Return the error of a row without turns.

    Args:
        row: Its columns.
        known: Columns that are read.
    """
    names = sorted(str(name) for name in row)
    shown = ", ".join(f"'{name}'" for name in names[:_MOST_COLUMNS]) + (", …" if names[_MOST_COLUMNS:] else "")
    found = f"it has neither 'messages' nor 'conversations', but {shown or 'no column'}; {_FORMS}"
    hint = next((f"{', '.join(sorted(columns))}: {what}" for columns, what in _RENAMED if columns <= row.keys()), None)
    for name in () if hint else (name for name in names if name not in known):
        if near := difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75):
            hint = f"rename '{name}' to '{near[0]}'"
            break
    return unknown(f"{found}: {hint}" if hint else found)


def other_form(found: str, stated: str) -> RejectedRowError:
    """Return the error of a row of another form than its source states."""
    return unknown(f"it is in the form '{found}', and its source says `format: {stated}`: say {found}, or auto")

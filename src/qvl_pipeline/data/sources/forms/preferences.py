"""Preference data: answers that are compared or judged, all of which a fine-tuning would learn from."""

from __future__ import annotations

from typing import Any

from qvl_pipeline.data.rejection import RejectedRowError, type_name

# Columns that compare answers (DPO and its kin), as TRL, LLaMA-Factory, ms-swift, OpenAI and LLaVA-RLHF call them, …
_COMPARED = (
    "chosen",
    "rejected",
    "chosen_response",
    "rejected_response",
    "rejected_messages",
    "preferred_output",
    "non_preferred_output",
    "preference",
    "output_1",
    "output_2",
)
# … and those that say whether the answer is a good one (KTO), where their value is true or false.
_JUDGED = ("label", "kto_tag")
_COLUMNS = frozenset(_COMPARED + _JUDGED)
_TRUTHS = ("true", "false")


def refuse_preferences(row: dict[str, Any]) -> None:
    """Refuse a row whose answer is one of several that are compared, or is judged good or bad.

    Raises:
        RejectedRowError: It is (`preference_data`).
    """
    if row.keys().isdisjoint(_COLUMNS):
        return
    for column in _COMPARED:
        if row.get(column) not in (None, [], {}, ""):
            raise _refused(column, type_name(row[column]))
    for column in _JUDGED:
        value = row.get(column)
        if isinstance(value, bool) or (isinstance(value, str) and value.lower() in _TRUTHS):
            raise _refused(column, str(value).lower())


def _refused(column: str, value: str) -> RejectedRowError:
    return RejectedRowError(
        "preference_data",
        f"its column '{column}' ({value}) makes it preference data, of which bad answers would be trained on as well: "
        "keep the rows with good answers, and drop or rename the column",
    )

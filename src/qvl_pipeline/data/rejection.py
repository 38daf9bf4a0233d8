"""Why a row could not be read: the rules of the table `rejects`."""

from __future__ import annotations

from typing import Any

from qvl_pipeline.secrets import without_url_secrets

REJECT_RULES = {
    "unreadable_row": "The row is not JSON, not an object, or not of the columns of its file.",
    "duplicated_key": "An object of the row has a key twice, and one of the values would be lost.",
    "unknown_format": "The row holds no conversation in a form that is known, or one of its values has the wrong type.",
    "preference_data": "The row compares answers or judges one; its bad answers would be trained on as well.",
    "embedded_media_invalid": "A medium is embedded in the row, but not as base64 of an image, a video or a sound.",
    "path_outside_data_folder": "A media path leaves the folder of its source, also by way of a symbolic link.",
    "url_not_allowed": "A medium is a URL, and `data_folder` is not. Only files of a remote folder are fetched.",
    "url_with_secret": "A medium is a URL with a password or a signature, which tables and pages would pass on.",
}

_TYPE_NAMES = {bool: "a boolean", int: "a number", float: "a number", str: "a text", bytes: "bytes", list: "a list"}
_LONGEST_QUOTE = 200


class RejectedRowError(Exception):
    """A row cannot be read.

    Attributes:
        rule: Name of the rule, a key of `REJECT_RULES`.
        detail: What is wrong with the row, without naming the row.
    """

    def __init__(self, rule: str, detail: str) -> None:
        """Reject a row under `rule`, for the reason `detail`, from which logins and queries of URLs are taken."""
        detail = without_url_secrets(detail)
        super().__init__(rule, detail)
        self.rule = rule
        self.detail = detail


def type_name(value: Any) -> str:
    """Name the JSON type of a value, with its article."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), "an object")


def quote(text: str) -> str:
    """Quote a text for a message; a long one (a picture in base64, say) is cut short."""
    return f"'{text}'" if len(text) <= _LONGEST_QUOTE else f"'{text[:_LONGEST_QUOTE]}…' ({len(text)} characters)"

"""What another machine of the same job saves: here it is only handed on, in memory."""

from __future__ import annotations

from typing import Any


class OfAnotherNode:
    """Marks data that node 0 of a job saves and that this node has computed as well."""


class PageOfAnotherNode(OfAnotherNode, str):
    """A page."""


class AnswerOfAnotherNode(OfAnotherNode, dict[str, Any]):
    """A JSON object."""

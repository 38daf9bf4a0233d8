"""Nested values as flat ones, by joined keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flattened(values: dict[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries with their keys joined by `separator`."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}{separator}{inner}", leaf) for inner, leaf in flattened(value, separator))
        else:
            yield str(key), value


def parameter_leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield parameters by their flat names; those of a block in a list by its name: `ingest.datasets.digits.limit`."""
    for key, value in flattened(values, "."):
        if value and isinstance(value, list) and all(isinstance(block, dict) for block in value):
            named = {str(block.get("name", number)): block for number, block in enumerate(value)}
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in parameter_leaves(named))
        else:
            yield key, value


def numbers(values: dict[str, Any], separator: str) -> dict[str, float]:
    """Return the numbers among the leaves of nested dictionaries, by their joined keys."""
    leaves = flattened(values, separator)
    return {key: value for key, value in leaves if isinstance(value, int | float) and not isinstance(value, bool)}

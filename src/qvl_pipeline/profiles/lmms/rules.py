"""What can become of a key of LMMS Engine. There is no other way: none is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class To:
    """It is a parameter here.

    Attributes:
        key: `block.key`; a third part is a key inside of that one.
        convert: Returns the value to write; raises `ValueError` with the reason where there is none.
        default: What LMMS Engine takes when a file says nothing, where that is not what happens here: it is written.
    """

    key: str
    convert: Callable[[Any], Any] = lambda value: value
    default: Any = None


@dataclass(frozen=True)
class Same:
    """What it says is what happens here in any case; with any other value it is refused.

    Attributes:
        values: What it may be.
        reason: What happens here.
    """

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Noted:
    """It decides nothing of the training, and something else does it here.

    Attributes:
        reason: What.
    """

    reason: str


@dataclass(frozen=True)
class Refused:
    """There is nothing like it.

    Attributes:
        reason: Why, and what to do.
    """

    reason: str


@dataclass(frozen=True)
class Together:
    """It is read together with others, in `mapping.py`."""


Rule = To | Same | Noted | Refused | Together


def only(*values: Any, reason: str) -> Callable[[Any], Any]:
    """Return a conversion that lets some values through and refuses all others."""

    def convert(value: Any) -> Any:
        if value not in values:
            raise ValueError(reason)
        return value

    return convert

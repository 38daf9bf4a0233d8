"""Values of a row, taken for what they must be; anything else rejects the row and says where it is."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson

from qvl_pipeline.data.rejection import RejectedRowError, type_name

Row = dict[str, Any]
Kind = TypeVar("Kind")


def is_given(value: Any) -> bool:
    """Whether a value says anything. Columnar files give every object every key, and null to those it does not use."""
    if value is None:
        return False
    if isinstance(value, dict):
        return any(map(is_given, value.values()))
    return value != []


def expect(kind: type[Kind], value: Any, where: str) -> Kind:
    """Return a value that must be of a type.

    Raises:
        RejectedRowError: It is of another.
    """
    if not isinstance(value, kind):
        raise unknown(f"{where} is {type_name(value)}, not {type_name(kind())}")
    return value


def parsed(value: Any, where: str) -> Any:
    """Return a value that a table may hold as JSON text: parsed, where it is a text.

    Raises:
        RejectedRowError: The text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise unknown(f"{where} is a text that is not JSON ({error})") from error


def refuse_unknown(given: Row, known: set[str] | frozenset[str], where: str) -> None:
    """Refuse keys that would be ignored: a frame rate, a picture's bytes, a thought."""
    if given.keys() <= known:
        return
    if others := sorted(str(key) for key, value in given.items() if key not in known and is_given(value)):
        raise unknown(f"{where} has the key '{others[0]}', which is not supported")


def unknown(detail: str) -> RejectedRowError:
    """Return the error of a row that is in no known form."""
    return RejectedRowError("unknown_format", detail)

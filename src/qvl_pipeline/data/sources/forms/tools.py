"""Tools that a conversation may use, and calls of them, in OpenAI's form: what chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qvl_pipeline.data.sources.forms.checked import Row, expect, is_given, parsed, refuse_unknown, unknown

_CALL_KEYS = frozenset({"id", "type", "function", "name", "arguments", "index"})


def without_null_keys(row: Row, turn_columns: Sequence[str]) -> Row:
    """Take the keys that are null out of the tools and calls of a row of a table.

    Columns give every object the keys of all others: a call would have the arguments of all calls of the table. Rows of
    JSON keep theirs, for there a null was written.
    """
    columns = [column for column in turn_columns if isinstance(row.get(column), list) and any(map(_calls, row[column]))]
    columns += ["tools"] if isinstance(row.get("tools"), list) else []
    return {**row, **{column: _pruned(row[column]) for column in columns}} if columns else row


def _calls(turn: Any) -> bool:
    return isinstance(turn, dict) and any(turn.get(key) for key in ("tool_calls", "function_call"))


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def read_tools(value: Any) -> list[Row]:
    """Read the column `tools`.

    Args:
        value: A list, or a JSON text of one; of functions in OpenAI's form, bare ones, or JSON texts of these.

    Returns:
        `{"type": "function", "function": {"name": …, …}}` of each.

    Raises:
        RejectedRowError: It is something else (`unknown_format`).
    """
    if not is_given(value) or value == "":
        return []
    tools = []
    for number, given in enumerate(expect(list, parsed(value, "'tools'"), "'tools'")):
        where = f"tools[{number}]"
        tool = expect(dict, parsed(given, where), where)
        function = tool["function"] if is_given(tool.get("function")) else tool
        if not expect(dict, function, f"{where}.function").get("name"):
            raise unknown(f"{where} has no 'name'")
        tools.append({"type": "function", "function": function})
    return tools


def is_call(item: Any) -> bool:
    """Whether an item of a content is a call, as LLaMA-Factory v1 writes one; its `value` is for `read_calls`."""
    return isinstance(item, dict) and item.get("type") == "tool_call"


def read_calls(value: Any, where: str) -> list[Row]:
    """Read the calls of a turn.

    Args:
        value: One call or a list, or a JSON text of these; a call is in OpenAI's form, or `name` and `arguments` alone.
        where: Place in the row.

    Returns:
        `{"type": "function", "function": {"name", "arguments"}}` of each, with its `id` where it has one. Arguments
        are an object, also where a text of one was given: OpenAI writes them so, and engines that serve parse it.

    Raises:
        RejectedRowError: It is something else (`unknown_format`).
    """
    value = parsed(value, where)
    calls = []
    for number, given in enumerate(value if isinstance(value, list) else [value]):
        place = f"{where}[{number}]"
        call = expect(dict, parsed(given, place), place)
        refuse_unknown(call, _CALL_KEYS, place)
        function = expect(dict, call["function"], f"{place}.function") if is_given(call.get("function")) else call
        name = expect(str, function.get("name"), f"{place}.name")
        arguments = parsed(function.get("arguments"), f"{place}.arguments")
        arguments = expect(dict, {} if arguments is None else arguments, f"{place}.arguments")
        own_id = {"id": call["id"]} if is_given(call.get("id")) else {}
        calls.append({**own_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls

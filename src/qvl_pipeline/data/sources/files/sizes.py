"""How large Arrow data is once it is decoded, told without decoding it; and its plain form, in which it is handed on.

A few bytes of a file can stand for gigabytes: a dictionary entry, a run or a view that is used many times, a list of
a billion nulls. So sizes are counted first, and rows decoded only as far as they fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

# What a value costs at least: as a value of Python some 60 bytes, as much as `{},` in JSON, in which rows are limited.
VALUE_BYTES = 3
# Times that Python can express, with a margin for time zones.
_EARLIEST, _LATEST = np.datetime64("0001-01-03", "s"), np.datetime64("9999-12-30", "s")


def decoded_bytes(array: pa.Array) -> int:
    """Return an upper bound for the bytes that an array takes when it is decoded; of a single row it is close.

    Args:
        array: A valid array: its offsets are followed.
    """
    kind, rows = array.type, len(array)
    own = VALUE_BYTES * rows
    if isinstance(kind, pa.ExtensionType):
        return decoded_bytes(array.storage)
    if types.is_dictionary(kind):
        return own + _taken_bytes(array)
    if types.is_run_end_encoded(kind):
        runs = array.values.slice(array.find_physical_offset(), array.find_physical_length())
        return own + rows * decoded_bytes(runs)
    if isinstance(array, pa.StructArray):
        return own + sum(decoded_bytes(array.field(number)) for number in range(kind.num_fields))
    if types.is_union(kind):
        return own + rows * sum(decoded_bytes(array.field(number)) for number in range(kind.num_fields))
    if (items := _items(array)) is not None:
        # Lists of views may lie upon each other: each may be all there is.
        return own + sum(map(decoded_bytes, items)) * (rows if _may_overlap(kind) else 1)
    if kind in (pa.string_view(), pa.binary_view()):
        return own + _viewed_bytes(array)
    return own + array.nbytes


def plain(column: pa.Array) -> pa.Array:
    """Return a column in types that every reader knows; what the others hold becomes a value of such a type, or text.

    A categorical text is a text, a run as many values, an extension type what it is stored as, a time that Python
    cannot express a text.
    """
    target = _plain_type(column.type, far=_holds_far_time(column))
    if target == column.type:
        return column
    while isinstance(column.type, pa.ExtensionType):
        column = column.storage
    if types.is_run_end_encoded(column.type):
        return plain(pc.run_end_decode(column))
    try:
        found = column.cast(target)
        found.validate()  # a list of views that ends with a null is cast wrongly
        return found
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.array(column.to_pylist(), target) if types.is_nested(target) else _texts(column)


def _taken_bytes(array: pa.DictionaryArray) -> int:
    entries = array.dictionary
    if types.is_binary(entries.type) or types.is_string(entries.type) or types.is_large_string(entries.type):
        return pc.sum(pc.binary_length(entries).take(array.indices)).as_py() or 0
    if len(array) == 1:
        return decoded_bytes(entries.take(array.indices)) if array.indices[0].is_valid else 0
    return len(array) * decoded_bytes(entries)


def _items(array: pa.Array) -> list[pa.Array] | None:
    """Return what is in the lists of an array, of maps keys and values; `None` of what is no list."""
    kind, rows = array.type, len(array)
    if types.is_fixed_size_list(kind):
        return [array.values.slice(array.offset * kind.list_size, rows * kind.list_size)]
    if _may_overlap(kind):
        return [array.values] if rows != 1 else [array[0].values] if array[0].is_valid else []
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind)):
        return None
    start, end = (array.offsets[edge].as_py() for edge in (0, -1))
    children = [array.keys, array.items] if types.is_map(kind) else [array.values]
    return [child.slice(start, end - start) for child in children]


def _may_overlap(kind: pa.DataType) -> bool:
    return types.is_list_view(kind) or types.is_large_list_view(kind)


def _viewed_bytes(array: pa.Array) -> int:
    """Sum the lengths of views, which are the first four of the sixteen bytes of each."""
    validity, views = array.buffers()[:2]
    lengths = np.frombuffer(views, np.int32)[4 * array.offset :: 4][: len(array)].astype(np.int64)
    return int(lengths[array.is_valid().to_numpy(zero_copy_only=False)].sum()) if validity else int(lengths.sum())


def _plain_type(kind: pa.DataType, *, far: bool) -> pa.DataType:
    if isinstance(kind, pa.ExtensionType):
        return _plain_type(kind.storage_type, far=far)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain_type(kind.value_type, far=far)
    if kind == pa.string_view() or types.is_time32(kind) or types.is_decimal256(kind) or types.is_interval(kind):
        return pa.string()
    if far and types.is_temporal(kind):
        return pa.string()
    if kind == pa.binary_view():
        return pa.binary()
    if types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type, far=far), _plain_type(kind.item_type, far=far))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type, far=far)) for field in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type, far=far)), kind.list_size)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(_plain_type(kind.value_type, far=far)))
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type, far=far)))
    return kind


def _holds_far_time(array: pa.Array) -> bool:
    """Whether a time in an array, or inside of its values, is none that Python can express."""
    kind = array.type
    if isinstance(kind, pa.ExtensionType):
        return _holds_far_time(array.storage)
    if types.is_dictionary(kind):
        return _holds_far_time(array.dictionary)
    if types.is_run_end_encoded(kind):
        return _holds_far_time(array.values)
    if isinstance(array, pa.StructArray):
        return any(_holds_far_time(array.field(number)) for number in range(kind.num_fields))
    if not types.is_nested(kind) and not types.is_temporal(kind):
        return False
    if (items := _items(array)) is not None:
        return any(map(_holds_far_time, items))
    return not types.is_interval(kind) and types.is_temporal(kind) and _is_far(array)


def _is_far(array: pa.Array) -> bool:
    if types.is_time(array.type):
        return False
    numbers = array.view(pa.int32() if types.is_date32(array.type) else pa.int64())
    least, most = pc.min_max(numbers).as_py().values()
    if least is None:
        return False
    unit = {pa.date32(): "D", pa.date64(): "ms"}.get(array.type) or array.type.unit
    a_second = np.timedelta64(1, "s") / np.timedelta64(1, unit)
    if types.is_duration(array.type):
        return max(-least, most) / a_second > 86_400 * 999_999_999  # the limit of `timedelta`
    return least / a_second < _EARLIEST.astype(int) or most / a_second > _LATEST.astype(int)


def _texts(column: pa.Array) -> pa.Array:
    values: list[Any] = column.to_pylist()
    return pa.array([None if value is None else str(value) for value in values], pa.string())

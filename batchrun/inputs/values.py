"""One Arrow value as the JSON it stands for."""

from __future__ import annotations

from typing import cast
from uuid import UUID

import pyarrow as pa

from batchrun.config import JSONValue
from batchrun.errors import UsageError


def values_of(column: pa.Array, name: str) -> list[JSONValue]:
    """A column's values as JSON has them; temporal ones as text, UTF-8 bytes too."""
    try:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        wanted = _json_type(column.type)
        if wanted != column.type:
            column = column.cast(wanted)
        values: list[JSONValue] = column.to_pylist(maps_as_pydicts="lossy")
    except (pa.ArrowException, ValueError, OverflowError) as exc:
        raise UsageError(
            f'column "{name}": its type {column.type} has no form in JSON; leave it out or cast it'
        ) from exc
    return values if _is_plain(column.type) else [_json_value(value) for value in values]


def _is_plain(kind: pa.DataType) -> bool:
    """Whether Python's values of this type are JSON's already."""
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
    )


def _json_type(kind: pa.DataType) -> pa.DataType:
    """``kind`` with everything temporal, at any depth, as text: Python's types hold less."""
    types = pa.types
    if types.is_temporal(kind) and not types.is_duration(kind):
        return pa.string()
    if types.is_duration(kind):
        return pa.int64()
    if types.is_struct(kind):
        return pa.struct([field.with_type(_json_type(field.type)) for field in kind])
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_json_type(kind.value_type)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_json_type(kind.value_type)))
    return kind


def _json_value(value: object) -> JSONValue:
    """Nulls in structs become absent members; those in lists are elements and stay."""
    if isinstance(value, dict):
        return {k: _json_value(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass  # stays bytes: the row says so when it is to be sent
    if isinstance(value, UUID):
        return str(value)
    return cast("JSONValue", value)

"""What tables say of their columns beside the types, kept true for the output.

Parquet keeps notes of its writer with the schema and with each field: pandas' real dtypes and
index, polars' enumerations, units. The output has the same columns and more, some of another name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa

_PANDAS: Final = b"pandas"


_PLAIN_LABELS: Final = {
    "name": None,
    "field_name": None,
    "pandas_type": "unicode",
    "numpy_type": "object",
    "metadata": {"encoding": "UTF-8"},
}


class TableNotes:
    """The notes on which all tables agree."""

    def __init__(self) -> None:
        self._of_schema: dict[bytes, bytes] | None = None
        self._of_fields: dict[str, dict[bytes, bytes]] = {}
        self._pandas: dict[str, Any] | None = None

    def add(self, schema: pa.Schema) -> None:
        """Take what one more table says."""
        notes = dict(schema.metadata or {})
        self._pandas = _both_pandas(self._pandas, _parsed(notes.pop(_PANDAS, b"")))
        first = self._of_schema is None
        self._of_schema = notes if first else _common(self._of_schema or {}, notes)
        for field in schema:
            own = dict(field.metadata or {})
            held = self._of_fields.get(field.name)
            self._of_fields[field.name] = own if held is None else _common(held, own)

    def of_schema(self, carried_as: Mapping[str, str], unchanged: set[str]) -> dict[bytes, bytes]:
        """The output's. ``carried_as`` has the names there; ``unchanged`` kept their types."""
        notes = dict(self._of_schema or {})
        if self._pandas is not None:
            notes[_PANDAS] = json.dumps(_carried(self._pandas, carried_as, unchanged)).encode()
        return notes

    def of_field(self, name: str) -> dict[bytes, bytes]:
        return self._of_fields.get(name, {})


def _common(a: Mapping[bytes, bytes], b: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: value for key, value in a.items() if b.get(key) == value}


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        notes = json.loads(text)
        columns = {_field_of(column): column for column in notes["columns"]}
        if not all(isinstance(name, str) for name in columns):
            return None
        return {**notes, "columns": columns, "index_columns": list(notes["index_columns"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _field_of(column: Mapping[str, Any]) -> Any:
    return column.get("field_name") or column["name"]


def _both_pandas(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    """What two tables say together; of a column on which they differ, nothing."""
    if a is None or b is None:
        return a or b
    columns = {**b["columns"], **a["columns"]}
    agreed = {n: c for n, c in columns.items() if b["columns"].get(n, c) == c}
    index = a["index_columns"] if a["index_columns"] == b["index_columns"] else []
    return {**a, "columns": agreed, "index_columns": index}


def _carried(
    notes: Mapping[str, Any], carried_as: Mapping[str, str], unchanged: set[str]
) -> dict[str, Any]:
    columns = [
        _renamed(column, carried_as[name])
        for name, column in notes["columns"].items()
        if name in unchanged
    ]
    # A range that fits no more (rows left out) is for pandas to see and pass over.
    index = [
        carried_as.get(each) if isinstance(each, str) else each for each in notes["index_columns"]
    ]
    labels = notes.get("column_indexes")
    # Labels that are numbers or tuples have no room for the answer columns' names.
    plain = isinstance(labels, list) and [_labels_type(each) for each in labels] == ["unicode"]
    return {
        **notes,
        "columns": columns,
        "index_columns": [each for each in index if each is not None],
        "column_indexes": labels if plain else [_PLAIN_LABELS],
    }


def _labels_type(labels: object) -> object:
    return labels.get("pandas_type") if isinstance(labels, dict) else None


def _renamed(column: Mapping[str, Any], name: str) -> dict[str, Any]:
    if _field_of(column) == name:
        return dict(column)
    own = column.get("name")
    return {**column, "name": name if own == _field_of(column) else own, "field_name": name}

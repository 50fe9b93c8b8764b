"""The columns ``parsed_*``: what a typed answer holds, in the types of its schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias, cast

import msgspec
import pyarrow as pa

from batchrun import chat
from batchrun.chat import AnswerSchema
from batchrun.config import JSONValue
from batchrun.outputs.columns import NAMES, PAID_BY, TEXT, Column
from batchrun.outputs.footer import Footer
from batchrun.outputs.rows import Rows

PREFIX: Final = "parsed_"
Convert: TypeAlias = Callable[[JSONValue], object]
_SCALARS: Final[Mapping[str, tuple[pa.DataType, Convert]]] = {
    "string": (TEXT, lambda value: value),
    "integer": (pa.int64(), lambda value: _as_int64(value)),
    "number": (pa.float64(), lambda value: None if value is None else float(cast("float", value))),
    "boolean": (pa.bool_(), lambda value: value),
}


def _as_int64(value: JSONValue) -> int | None:
    """A whole number, which JSON may write as 1.0; null beyond 64 bits."""
    whole = int(value) if isinstance(value, int | float) else None
    return whole if whole is not None and -(1 << 63) <= whole < 1 << 63 else None


def names(schema: AnswerSchema | None, *, dedupe: bool = False) -> tuple[str, ...]:
    """All columns that are not the input's."""
    more = (*([PAID_BY] if dedupe else ()), *parsed_columns(schema))
    return NAMES + tuple(column.name for column in more)


def names_of(footer: Footer) -> tuple[str, ...]:
    """Those of an output."""
    return names(schema_of(footer), dedupe=footer.dedupes)


def more_columns(footer: Footer) -> list[Column]:
    """Those of an output beside the ones that every output has, in their order."""
    paid_by = [PAID_BY] if footer.dedupes else []
    return [*paid_by, *parsed_columns(schema_of(footer))]


def schema_of(footer: Footer) -> AnswerSchema | None:
    """The schema that the answers of an output had to fit."""
    schema = footer.settings.get("schema")
    return AnswerSchema(schema) if isinstance(schema, dict) else None


def parsed_columns(schema: AnswerSchema | None) -> list[Column]:
    """One column for each property at the top of the schema, in its order."""
    if schema is None:
        return []
    properties = schema.resolved(schema.schema).get("properties")
    answers = _Answers(schema)
    return [
        _column(name, schema, inner, answers)
        for name, inner in (properties.items() if isinstance(properties, Mapping) else ())
    ]


class _Answers:
    """The objects of a piece's rows, read once for all columns."""

    def __init__(self, schema: AnswerSchema) -> None:
        self._schema = schema
        self._of: Rows | None = None
        self._found: list[Mapping[str, JSONValue]] = []

    def of(self, rows: Rows) -> Sequence[Mapping[str, JSONValue]]:
        if rows is not self._of:
            self._found = [
                {} if failed is not None or text is None else self._value(text)
                for failed, text in zip(rows.failed, rows.answers.responses, strict=True)
            ]
            self._of = rows
        return self._found

    def _value(self, text: str) -> Mapping[str, JSONValue]:
        value = self._schema.value(text)
        return value if isinstance(value, dict) else {}


def _column(name: str, schema: AnswerSchema, inner: JSONValue, answers: _Answers) -> Column:
    kind, convert = _typed(schema, inner, ())
    kept = chat.without_surrogates(name)

    def values(rows: Rows) -> Sequence[object]:
        return [convert(found.get(name)) for found in answers.of(rows)]

    return Column(PREFIX + kept, kind, values, repeats=kind == TEXT)


def _typed(
    schema: AnswerSchema, inner: JSONValue, above: tuple[object, ...]
) -> tuple[pa.DataType, Convert]:
    """The one type of all values that fit ``inner``, else JSON text."""
    found = _without_null(schema, schema.resolved(inner))
    if id(found) in above:
        return TEXT, _as_json
    above = (*above, id(found))
    kind = found.get("type")
    if isinstance(kind, list):
        kinds = [each for each in kind if each != "null"]
        kind = kinds[0] if len(kinds) == 1 else None
    if kind is None:
        kind = _kind_of_values(found)
    if kind == "array" and isinstance(found.get("items"), Mapping):
        return _list(*_typed(schema, found["items"], above))
    if kind == "object" and isinstance(found.get("properties"), Mapping):
        return _struct(schema, cast("Mapping[str, JSONValue]", found["properties"]), above)
    return _SCALARS.get(str(kind), (TEXT, _as_json))


def _without_null(schema: AnswerSchema, found: Mapping[str, JSONValue]) -> Mapping[str, JSONValue]:
    """The other of two alternatives of which one is null, as Pydantic writes an Optional."""
    for word in ("anyOf", "oneOf"):
        choices = found.get(word)
        if isinstance(choices, list) and "type" not in found:
            others = [schema.resolved(each) for each in choices]
            others = [each for each in others if each.get("type") != "null"]
            if len(others) == 1:
                return others[0]
    return found


def _kind_of_values(found: Mapping[str, JSONValue]) -> str | None:
    values = found.get("enum")
    if not isinstance(values, list):
        values = [found["const"]] if "const" in found else []
    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) != 1:
        return None
    return {str: "string", bool: "boolean", int: "integer", float: "number"}.get(kinds.pop())


def _list(kind: pa.DataType, convert: Convert) -> tuple[pa.DataType, Convert]:
    def values(value: JSONValue) -> object:
        return [convert(item) for item in value] if isinstance(value, list) else None

    return pa.list_(kind), values


def _struct(
    schema: AnswerSchema, properties: Mapping[str, JSONValue], above: tuple[object, ...]
) -> tuple[pa.DataType, Convert]:
    inner = {name: _typed(schema, each, above) for name, each in properties.items()}
    if not inner:  # no Parquet reader has a struct of nothing
        return TEXT, _as_json

    def values(value: JSONValue) -> object:
        if not isinstance(value, dict):
            return None
        return {name: convert(value.get(name)) for name, (_, convert) in inner.items()}

    fields = [pa.field(chat.without_surrogates(name), kind) for name, (kind, _) in inner.items()]
    return pa.struct(fields), values


def _as_json(value: JSONValue) -> object:
    return None if value is None else msgspec.json.encode(value).decode()

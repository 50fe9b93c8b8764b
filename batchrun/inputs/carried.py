"""The input's own columns, made anew for the output from rows or tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

import pyarrow as pa

from batchrun.chat import json_text, without_surrogates
from batchrun.config import JSONValue
from batchrun.errors import StoppedEarly
from batchrun.inputs.rows import Row, Rows
from batchrun.inputs.table_notes import TableNotes
from batchrun.inputs.values import values_of

# Integers up to here are exact as doubles.
EXACT: Final = 1 << 53


class TableColumns(NamedTuple):
    """What a table says of its columns before a row is read."""

    schema: pa.Schema
    rounded: Collection[str]  # columns of integers that a double may not hold exactly


class Carried:
    """The input's columns as the output has them, and how to make them.

    ``renamed`` lists (column, carried as); ``as_text`` names the columns of JSONL whose values are
    written as JSON, for want of one type; ``surrogates`` counts the lone surrogates that became
    U+FFFD in what was converted so far.
    """

    def __init__(
        self,
        types: Mapping[str, pa.DataType],
        taken: Collection[str],
        notes: TableNotes | None = None,
        unchanged: Collection[str] = (),
        as_text: Sequence[str] = (),
    ) -> None:
        """``notes`` are of tables whose columns ``unchanged`` have the types they had there."""
        self.as_text = as_text
        self._columns = list(types.items())
        outputs = _output_names(types, taken)
        self.sources = frozenset(types)
        carried_as = dict(zip(types, outputs, strict=True))
        notes = notes or TableNotes()
        self.schema = pa.schema(
            [
                pa.field(
                    carried_as[name],
                    kind,
                    metadata=notes.of_field(name) if name in unchanged else None,
                )
                for name, kind in types.items()
            ],
            metadata=notes.of_schema(carried_as, set(unchanged)),
        )
        self.renamed = [(n, out) for n, out in zip(types, outputs, strict=True) if n != out]
        self.surrogates = 0

    def from_rows(self, rows: Rows) -> pa.RecordBatch:
        """The carried columns of JSONL rows; a bad row has nulls.

        StoppedEarly when a value does not fit the type found before: the file was changed.
        """
        good = [row if type(row) is dict else {} for row in rows]
        arrays = [self._column(name, kind, good) for name, kind in self._columns]
        return self._batch(arrays, len(rows))

    def _column(self, name: str, kind: pa.DataType, rows: Sequence[Row]) -> pa.Array:
        values = [row.get(name) for row in rows]
        if not is_text(kind):
            try:
                return pa.array(values, kind)
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as exc:
                raise StoppedEarly(
                    f'column "{name}" changed while the input was read; run the command again'
                ) from exc
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, ValueError, TypeError):
            return pa.array([self._text(value) for value in values], kind)

    def _text(self, value: JSONValue) -> str | None:
        if value is None:
            return None
        text = value if isinstance(value, str) else json_text(value)
        clean = without_surrogates(text)
        if clean != text:
            self.surrogates += sum(a != b for a, b in zip(text, clean, strict=True))
        return clean

    def from_table(self, record: pa.RecordBatch) -> pa.RecordBatch:
        """The carried columns of a table's rows."""
        arrays = []
        for name, kind in self._columns:
            at = record.schema.get_field_index(name)
            if at < 0:
                arrays.append(pa.nulls(record.num_rows, kind))
            else:
                arrays.append(self._converted(record.column(at), kind, name))
        return self._batch(arrays, record.num_rows)

    def _converted(self, column: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
        if column.type == kind:
            return column
        if is_text(kind) and not is_text(column.type):
            return pa.array([self._text(value) for value in values_of(column, name)], kind)
        return column.cast(kind)

    def _batch(self, arrays: list[pa.Array], rows: int) -> pa.RecordBatch:
        if arrays:
            return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        # Without columns a batch cannot know its length; its users take it from the rows.
        return pa.RecordBatch.from_pylist([{}] * rows, schema=self.schema)


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _output_names(names: Collection[str], others: Collection[str]) -> list[str]:
    """Names that clash neither with others, case aside, nor with each other."""
    taken = {without_surrogates(name) for name in names}
    outputs: list[str] = []
    for name in names:
        output = without_surrogates(name)
        while output.casefold() in others or (output != name and output in taken):
            output = f"input_{output}"
        taken.add(output)
        outputs.append(output)
    return outputs

"""The input's own columns, on their way to the output: one type a column over the whole file."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Final, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.chat import ANSWER_COLUMNS, CUSTOM_ID, json_text, without_surrogates
from batchrun.config import JSONValue
from batchrun.errors import StoppedEarly, UsageError
from batchrun.inputs.parquet import open_table, schema_of
from batchrun.inputs.rows import BadRow, Batch, InputFile, Row, Rows
from batchrun.inputs.table_notes import TableNotes
from batchrun.inputs.values import values_of

# One column per key: a file whose keys are data would make a table nobody can read.
_COLUMN_LIMIT: Final = 5_000


# Integers up to here are exact as doubles.
_EXACT: Final = 1 << 53


class _Wide:
    """The kind of an integer that a double may not hold exactly."""


class _Huge:
    """The kind of an integer beyond 64 bits."""


_NULL: Final = type(None)


class ColumnTypes:
    """Finds one type for every carried column, over all rows of all files.

    ``carry`` names the columns to carry, in that order; None carries all, in order of appearance.
    """

    def __init__(self, carry: tuple[str, ...] | None) -> None:
        self._carry = carry
        self._kinds: dict[str, set[type]] = {}  # of the values of JSONL rows
        self._types: dict[str, list[_TableType]] = {}  # of the columns of tables
        self._order: dict[str, None] = {}
        self._tables: set[Path] = set()
        self._notes = TableNotes()
        self._rows = 0
        for name in carry or ():
            self._kinds[name] = set()

    def observe(self, file: InputFile, batch: Batch) -> None:
        """Take note of a batch. Of tables the schema suffices; their rows are not looked at."""
        self._rows += len(batch)
        if file.format == "parquet":
            if file.path not in self._tables:
                self._tables.add(file.path)
                self._observe_table(file)
        elif self._carry is None:
            self._observe_all(batch.rows)
        elif self._carry:
            self._observe_named(batch.rows)

    def _observe_all(self, rows: Rows) -> None:
        columns = _columns_of(rows)
        if columns is None:
            for row in rows:
                if type(row) is dict:
                    for name, value in row.items():
                        self._note(name, _kinds_of((value,)))
            return
        for name, values in columns.items():
            self._note(name, _kinds_of(values))

    def _note(self, name: str, kinds: set[type]) -> None:
        try:
            self._kinds[name] |= kinds
        except KeyError:
            self._admit(name)
            self._kinds[name] = kinds

    def _observe_named(self, rows: Rows) -> None:
        for name in self._carry or ():
            values = [row[name] for row in rows if type(row) is dict and name in row]
            if values:
                self._order[name] = None
                self._note(name, _kinds_of(values))

    def _observe_table(self, file: InputFile) -> None:
        with open_table(file) as table:
            schema = schema_of(file, table)
            self._notes.add(schema)
            for field in schema:
                if self._carry is None or field.name in self._carry:
                    self._admit(field.name)
                    seen = _TableType(field.type, _fits_double(table.metadata, field))
                    self._types.setdefault(field.name, []).append(seen)

    def _admit(self, name: str) -> None:
        self._order[name] = None
        if len(self._order) > _COLUMN_LIMIT:
            raise UsageError(
                f"more than {_COLUMN_LIMIT:,} different columns; name those to keep with --carry"
            )

    def carried(self) -> Carried:
        """What was found. UsageError when a column named by --carry is nowhere."""
        names = list(self._order) if self._carry is None else list(self._carry)
        if self._carry and self._rows:
            for name in self._carry:
                if name not in self._order:
                    raise UsageError(f"--carry {name}: no row has a column of that name")
        types = {name: self._type(name) for name in names if name != CUSTOM_ID}
        unchanged = {
            name
            for name, kind in types.items()
            if all(seen.type == kind for seen in self._types.get(name, ()))
        }
        as_text = [
            name
            for name, kind in types.items()
            if _is_text(kind) and not self._kinds.get(name, set()) <= {str, _NULL}
        ]
        return Carried(types, self._notes, unchanged, as_text)

    def _type(self, name: str) -> pa.DataType:
        found = list(self._types.get(name, ()))
        if kinds := self._kinds.get(name):
            found.append(_type_of_kinds(kinds))
        merged = found[0] if found else _TableType(pa.null(), True)
        for other in found[1:]:
            merged = _merged(merged, other)
        # Only a table's own column of nulls keeps that type.
        keep_null = name in self._types
        return pa.string() if pa.types.is_null(merged.type) and not keep_null else merged.type


class RepeatedIds:
    """Finds rows whose ``custom_id`` an earlier row has, in eight bytes a row."""

    def __init__(self) -> None:
        self._hashes = array("q")  # 0: a row without one

    def add(self, rows: Rows) -> None:
        self._hashes.extend(map(_id_hash, rows))

    def found(self) -> tuple[int, int, int] | None:
        """How many rows do, and the numbers of two that share one; None when none does."""
        import pyarrow.compute as pc  # only here, and not for nothing

        buffers = [None, pa.py_buffer(self._hashes)]
        hashes = pa.Array.from_buffers(pa.int64(), len(self._hashes), buffers)
        in_order = hashes.sort()
        later = in_order[1:]
        repeated = pc.and_(pc.equal(later, in_order[:-1]), pc.not_equal(later, 0))
        at = pc.index(repeated, True).as_py()
        if at < 0:
            return None
        value = later[at].as_py()
        first = self._hashes.index(value)
        again = self._hashes.index(value, first + 1)
        return repeated.true_count, first + 1, again + 1


def _id_hash(row: Row | BadRow) -> int:
    name = row.get(CUSTOM_ID) if type(row) is dict else None
    if name is None:
        return 0
    text = name if isinstance(name, str) else json_text(name)
    return (hash(text) or 1) if text else 0


class _TableType(NamedTuple):
    type: pa.DataType
    fits_double: bool  # every integer in it is exact as a double


def _columns_of(rows: Rows) -> dict[str, list[JSONValue]] | None:
    """The values by column; None unless all rows are good and have the same columns."""
    good = cast("list[Row]", rows)
    try:
        if len(set(map(len, good))) > 1:
            return None
        return {name: list(map(itemgetter(name), good)) for name in good[0]}
    except (IndexError, KeyError, TypeError):
        return None


def _kinds_of(values: Sequence[JSONValue]) -> set[type]:
    kinds = set(map(type, values))
    if int in kinds:
        whole = [value for value in values if type(value) is int]
        if min(whole) < -_EXACT or max(whole) > _EXACT:
            kinds |= {_int_kind(value) for value in whole if not -_EXACT <= value <= _EXACT}
    return kinds


def _int_kind(value: int) -> type:
    return _Wide if -(1 << 63) <= value < 1 << 63 else _Huge


def _type_of_kinds(kinds: set[type]) -> _TableType:
    """One type for JSON values of these kinds (contract §4)."""
    kinds = kinds - {_NULL}
    exact = _Wide not in kinds
    if not kinds:
        return _TableType(pa.null(), True)
    if kinds == {bool}:
        return _TableType(pa.bool_(), True)
    if kinds <= {int, _Wide}:
        return _TableType(pa.int64(), exact)
    if kinds <= {int, float}:
        return _TableType(pa.float64(), True)
    return _TableType(pa.string(), True)


def _merged(a: _TableType, b: _TableType) -> _TableType:
    """The type of one column in two files: a wider one that loses nothing, else text."""
    types = pa.types
    exact = a.fits_double and b.fits_double
    if a.type == b.type or types.is_null(b.type):
        return _TableType(a.type, exact)
    if types.is_null(a.type):
        return _TableType(b.type, exact)
    if types.is_integer(a.type) and types.is_integer(b.type):
        wider = _wider_integer(a.type, b.type)
        return _TableType(wider, exact)
    if _is_number(a.type) and _is_number(b.type) and exact:
        return _TableType(pa.float64(), True)
    if types.is_large_string(a.type) or types.is_large_string(b.type):
        return _TableType(pa.large_string(), True)
    return _TableType(pa.string(), True)


def _wider_integer(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    signed = pa.types.is_signed_integer
    if signed(a) == signed(b):
        return a if a.bit_width >= b.bit_width else b
    if pa.uint64() in (a, b):
        return pa.string()
    return pa.int64()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _fits_double(metadata: pq.FileMetaData, field: pa.Field) -> bool:
    """Whether a column's integers are all exact as doubles, as far as its statistics tell."""
    if not pa.types.is_integer(field.type) or field.type.bit_width < 64:
        return True
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            column = group.column(c)
            if column.path_in_schema == field.name:
                bounds = column.statistics
                if bounds is None or not bounds.has_min_max:
                    return False
                if max(abs(bounds.min), abs(bounds.max)) > _EXACT:
                    return False
    return True


class Carried:
    """The input's columns as the output has them, and how to make them.

    ``renamed`` lists (column, carried as); ``as_text`` names the columns of JSONL whose values are
    written as JSON, for want of one type; ``surrogates`` counts the lone surrogates that became
    U+FFFD in what was converted so far.
    """

    def __init__(
        self,
        types: Mapping[str, pa.DataType],
        notes: TableNotes | None = None,
        unchanged: Collection[str] = (),
        as_text: Sequence[str] = (),
    ) -> None:
        """``notes`` are of tables whose columns ``unchanged`` have the types they had there."""
        self.as_text = as_text
        self._columns = list(types.items())
        outputs = _output_names(types)
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
        if not _is_text(kind):
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
        if _is_text(kind) and not _is_text(column.type):
            return pa.array([self._text(value) for value in values_of(column, name)], kind)
        return column.cast(kind)

    def _batch(self, arrays: list[pa.Array], rows: int) -> pa.RecordBatch:
        if arrays:
            return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        # Without columns a batch cannot know its length; its users take it from the rows.
        return pa.RecordBatch.from_pylist([{}] * rows, schema=self.schema)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _output_names(names: Iterable[str]) -> list[str]:
    """Names that clash with neither the answer columns, case aside, nor each other."""
    names = list(names)
    taken = {without_surrogates(name) for name in names}
    outputs: list[str] = []
    for name in names:
        output = without_surrogates(name)
        while output.casefold() in ANSWER_COLUMNS or (output != name and output in taken):
            output = f"input_{output}"
        taken.add(output)
        outputs.append(output)
    return outputs

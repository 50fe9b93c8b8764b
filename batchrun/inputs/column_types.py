"""Which type a column has over the whole input: one that loses nothing, else text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Final, NamedTuple, cast

import pyarrow as pa

from batchrun.chat import CUSTOM_ID
from batchrun.config import JSONValue
from batchrun.errors import UsageError
from batchrun.inputs.carried import EXACT, Carried, TableColumns, is_text
from batchrun.inputs.formats import columns_of
from batchrun.inputs.rows import Batch, InputFile, Row, Rows
from batchrun.inputs.table_notes import TableNotes

# One column per key: a file whose keys are data would make a table nobody can read.
_COLUMN_LIMIT: Final = 5_000


class _Wide:
    """The kind of an integer that a double may not hold exactly."""


class _Huge:
    """The kind of an integer beyond 64 bits."""


_NULL: Final = type(None)


class ColumnTypes:
    """Finds one type for every carried column, over all rows of all files.

    ``carry`` names the columns to carry, in that order; None carries all, in order of appearance.
    A column named as one of ``taken``, case aside, gives way.
    """

    def __init__(self, carry: tuple[str, ...] | None, taken: Collection[str]) -> None:
        self._carry = carry
        self._taken = taken
        self._kinds: dict[str, set[type]] = {}  # of the values of JSONL rows
        self._types: dict[str, list[_TableType]] = {}  # of the columns of tables
        self._order: dict[str, None] = {}
        self._begun: set[Path] = set()
        self._table: TableColumns | None = None  # of the file that is being read
        self._notes = TableNotes()
        self._rows = 0
        for name in carry or ():
            self._kinds[name] = set()

    def observe(self, file: InputFile, batch: Batch) -> None:
        """Take note of a batch. Of tables the schema suffices; their rows are not looked at."""
        self._rows += len(batch)
        if file.path not in self._begun:
            self._begun.add(file.path)
            self._table = columns_of(file)
            if self._table is not None:
                self._observe_table(self._table)
        if self._table is not None:
            return
        if self._carry is None:
            self._observe_all(batch.rows)
        elif self._carry:
            self._observe_named(batch.rows)

    def observe_schema(self, schema: pa.Schema) -> None:
        """Take note of a table that is in no file; UsageError for a name that it has twice."""
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise UsageError(f'two columns are named "{twice}"; rename one')
        self._rows += 1
        self._observe_table(TableColumns(schema, set()))

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

    def _observe_table(self, table: TableColumns) -> None:
        self._notes.add(table.schema)
        for field in table.schema:
            if self._carry is None or field.name in self._carry:
                self._admit(field.name)
                seen = _TableType(field.type, field.name not in table.rounded)
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
            if is_text(kind) and not self._kinds.get(name, set()) <= {str, _NULL}
        ]
        return Carried(types, self._taken, self._notes, unchanged, as_text)

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
        if min(whole) < -EXACT or max(whole) > EXACT:
            kinds |= {_int_kind(value) for value in whole if not -EXACT <= value <= EXACT}
    return kinds


def _int_kind(value: int) -> type:
    return _Wide if -(1 << 63) <= value < 1 << 63 else _Huge


def _type_of_kinds(kinds: set[type]) -> _TableType:
    """One type for JSON values of these kinds."""
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

"""Parquet to rows: record batches, and from them Python values where a request needs them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.errors import LocalIOError, UsageError
from batchrun.inputs.carried import EXACT, Carried, TableColumns
from batchrun.inputs.rows import (
    BATCH_BYTES,
    BATCH_ROWS,
    READ_BYTES,
    Batch,
    Head,
    InputFile,
    Rows,
    with_folders,
)
from batchrun.inputs.unpack import mapped_errors, refusal, start_of
from batchrun.inputs.values import values_of

# The schema says what a table has; its first rows serve only to advise.
_HEAD_ROWS: Final = 100


def head(file: InputFile, wanted: int) -> Head:
    """The columns of the schema, and a few rows."""
    with _opened(file) as table:
        size = min(wanted, _HEAD_ROWS, _batch_rows(table.metadata))
        first = next(table.iter_batches(size, use_threads=False), None)
        found = [] if first is None else with_folders(file, rows_of(first))
        names = _schema_of(file, table).names
        return Head(names, [row for row in found if isinstance(row, dict)])


def read(
    file: InputFile, columns: Collection[str] | None, carry: Carried | None
) -> Iterator[Batch]:
    """All rows, numbered from 1; no column is read that nobody asked for."""
    with _opened(file) as table:
        names = _schema_of(file, table).names
        for_rows = [name for name in names if columns is None or name in columns]
        carried = carry.sources if carry else ()
        read_names = [name for name in names if name in for_rows or name in carried]
        own = [name for name in read_names if name in table.schema_arrow.names]
        done = 0
        for record in _records(table, own):
            record = _with_folders(file, record, read_names)
            lines = range(done + 1, done + 1 + record.num_rows)
            done += record.num_rows
            rows = partial(rows_of, record.select(for_rows))
            yield Batch(lines, rows, carry.from_table(record) if carry else None)


def columns_of(file: InputFile) -> TableColumns:
    """The schema, with the columns of the file's folders."""
    with _opened(file) as table:
        schema = _schema_of(file, table)
        rounded = {field.name for field in schema if not _fits_double(table.metadata, field)}
        return TableColumns(schema, rounded)


def bears_our_mark(path: Path) -> bool:
    """Whether the metadata are of an output."""
    try:
        with path.open("rb") as table:
            return b"batchrun" in (pq.read_metadata(table).metadata or {})
    except (OSError, ValueError, pa.ArrowException):
        return False  # reading it as an input will say what is wrong


@contextmanager
def _opened(file: InputFile) -> Iterator[pq.ParquetFile]:
    """The Parquet file, opened so that a big row group is not read into memory at once."""
    with mapped_errors(file), _mapped_errors(file):
        start = start_of(file.path, file.name)
        if not start:
            raise LocalIOError(f"{file.name}: is empty (0 bytes), not a Parquet file")
        if not start.startswith(b"PAR1"[: len(start)]):
            raise refusal(file, "Parquet", start)
        # By its descriptor: pyarrow takes some names for addresses, and those that are no UTF-8
        # for mistakes.
        with (
            file.path.open("rb") as raw,
            pq.ParquetFile(raw, pre_buffer=False, buffer_size=READ_BYTES) as table,
        ):
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UsageError(f'{file.name}: two columns are named "{twice}"; rename one')
            yield table


def _schema_of(file: InputFile, table: pq.ParquetFile) -> pa.Schema:
    """The table's schema and, behind it, the columns of the file's folders that it lacks."""
    schema = table.schema_arrow
    for name, _ in file.folders:
        if name not in table.schema_arrow.names:
            schema = schema.append(pa.field(name, pa.string()))
    return schema


def _with_folders(file: InputFile, record: pa.RecordBatch, wanted: Sequence[str]) -> pa.RecordBatch:
    for name, value in file.folders:
        if name in wanted and name not in record.schema.names:
            column = pa.repeat(pa.scalar(value, pa.string()), record.num_rows)
            record = record.append_column(name, column)
    return record


def _records(table: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    if table.metadata.num_rows == 0:
        schema = pa.schema([table.schema_arrow.field(name) for name in names])
        yield pa.RecordBatch.from_pylist([], schema=schema)
        return
    yield from table.iter_batches(_batch_rows(table.metadata), columns=names, use_threads=False)


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """How many rows of this table make about 4 MB; at most 1,024."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    widest = max((g.total_byte_size // g.num_rows for g in groups if g.num_rows), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, widest)))


def rows_of(record: pa.RecordBatch) -> Rows:
    """A record batch as JSON-like dicts; nulls are absent members, at every depth."""
    names = record.schema.names
    columns = [values_of(record.column(name), name) for name in names]
    if not columns:
        return [{} for _ in range(record.num_rows)]
    if not any(column.null_count for column in record.columns):
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return [
        {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for values in zip(*columns, strict=True)
    ]


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
                if max(abs(bounds.min), abs(bounds.max)) > EXACT:
                    return False
    return True


@contextmanager
def _mapped_errors(file: InputFile) -> Iterator[None]:
    try:
        yield
    # A damaged footer may hold names that are no text.
    except (pa.ArrowException, UnicodeDecodeError) as exc:
        raise LocalIOError(f"{file.name}: {_trouble(file, exc)}") from exc
    except OSError as exc:
        if exc.errno is not None:
            raise
        raise LocalIOError(f"{file.name}: {_trouble(file, exc)}") from exc


def _trouble(file: InputFile, exc: BaseException) -> str:
    """What is wrong with the file: its end says whether it is whole."""
    try:
        with file.path.open("rb") as raw:
            raw.seek(-min(4, file.path.stat().st_size), os.SEEK_END)
            end = raw.read(4)
    except OSError:
        end = b""
    if end == b"PARE":
        return "is encrypted Parquet, which cannot be read; decrypt it first"
    if end != b"PAR1":
        return "is cut short (a Parquet file without its end); copy or write it again"
    first_line = str(exc).strip().splitlines()[0][:200] if str(exc).strip() else type(exc).__name__
    return f"is damaged Parquet ({first_line}); copy or write it again"

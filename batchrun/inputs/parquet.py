"""Parquet to rows: record batches, and from them Python values where a request needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.errors import LocalIOError, UsageError
from batchrun.inputs.jsonl import refusal, start_of
from batchrun.inputs.rows import BATCH_BYTES, BATCH_ROWS, READ_BYTES, InputFile, Rows
from batchrun.inputs.trouble import mapped_errors
from batchrun.inputs.values import values_of


@contextmanager
def open_table(file: InputFile) -> Iterator[pq.ParquetFile]:
    """The Parquet file, opened so that a big row group is not read into memory at once."""
    with mapped_errors(file):
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


def schema_of(file: InputFile, table: pq.ParquetFile) -> pa.Schema:
    """The table's schema and, behind it, the columns of the file's folders that it lacks."""
    schema = table.schema_arrow
    for name, _ in file.folders:
        if name not in table.schema_arrow.names:
            schema = schema.append(pa.field(name, pa.string()))
    return schema


def with_folder_columns(
    file: InputFile, record: pa.RecordBatch, wanted: Sequence[str]
) -> pa.RecordBatch:
    for name, value in file.folders:
        if name in wanted and name not in record.schema.names:
            column = pa.repeat(pa.scalar(value, pa.string()), record.num_rows)
            record = record.append_column(name, column)
    return record


def records(table: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    if table.metadata.num_rows == 0:
        schema = pa.schema([table.schema_arrow.field(name) for name in names])
        yield pa.RecordBatch.from_pylist([], schema=schema)
        return
    yield from table.iter_batches(batch_rows(table.metadata), columns=names, use_threads=False)


def batch_rows(metadata: pq.FileMetaData) -> int:
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

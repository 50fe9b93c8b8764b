"""The door of reading: the head of a file, then its rows by the batch."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from functools import partial
from typing import Final, cast

from batchrun.inputs import foreign
from batchrun.inputs.carried import Carried
from batchrun.inputs.jsonl import groups, lines_of, opened, refusal, verdicts, with_folders
from batchrun.inputs.parquet import (
    batch_rows,
    open_table,
    records,
    rows_of,
    schema_of,
    with_folder_columns,
)
from batchrun.inputs.rows import BadRow, Batch, InputFile, Row, Rows
from batchrun.inputs.trouble import mapped_errors

HEAD_ROWS: Final = 1000


# A table's schema says what a table has; its first rows serve only to advise.
_TABLE_HEAD_ROWS: Final = 100


_HEAD_BYTES: Final = 32 << 20


def head(file: InputFile, rows: int = HEAD_ROWS) -> tuple[list[str], list[Row]]:
    """The columns of a file and its first good rows: what `prompts.detect` decides from.

    Columns are a table's schema, or the keys of the JSONL rows, in order of appearance. Fewer rows
    are read of a table, and of lines that are very long.
    """
    if file.format == "parquet":
        with open_table(file) as table:
            size = min(rows, _TABLE_HEAD_ROWS, batch_rows(table.metadata))
            batches = table.iter_batches(size, use_threads=False)
            first = next(batches, None)
            found = [] if first is None else rows_of(first)
            found = with_folders(file, found)
            names = schema_of(file, table).names
            return names, [row for row in found if isinstance(row, dict)]
    return _head_of_lines(file, rows)


def _head_of_lines(file: InputFile, wanted: int) -> tuple[list[str], list[Row]]:
    """UsageError for a file that has lines, and no JSON object among them."""
    good: list[Row] = []
    first_bad: tuple[int, BadRow] | None = None
    size_bytes = 0
    with mapped_errors(file), opened(file) as stream:
        start = stream.read(foreign.HEAD_BYTES)
    if foreign.is_one_document(start):
        raise refusal(file, "JSON lines", start)
    for numbers, rows, group_bytes in groups(file):
        good += [row for row in rows if isinstance(row, dict)]
        if not good and first_bad is None:
            first_bad = numbers[0], cast("BadRow", rows[0])
        size_bytes += group_bytes
        if len(good) >= wanted or (good and size_bytes >= _HEAD_BYTES):
            break
    if first_bad is not None and not good:
        number, row = first_bad
        why = f"no line of it is a JSON object (line {number}: {row.reason})"
        raise refusal(file, "JSON lines", start, why)
    del good[wanted:]
    return list(dict.fromkeys(itertools.chain.from_iterable(good))), good


def read(
    file: InputFile,
    *,
    columns: Collection[str] | None = None,
    carry: Carried | None = None,
) -> Iterator[Batch]:
    """The rows of a file in batches; a file without rows gives one empty batch.

    ``columns`` are those that ``rows`` must hold (None: all); a table reads no others. In a table
    a null is an absent member, at every depth. With ``carry``, ``carried`` holds its columns.
    LocalIOError when the file cannot be read to its end.
    """
    if file.format == "parquet":
        return _read_table(file, columns, carry)
    return _read_lines(file, carry)


def _read_lines(file: InputFile, carry: Carried | None) -> Iterator[Batch]:
    nothing = True
    first = 1
    for lines, _ in lines_of(file):
        batch = _batch_of(file, first, lines, carry)
        first += len(lines)
        if len(batch):
            yield batch
            nothing = False
    if nothing:
        yield Batch([], [], carry.from_rows([]) if carry else None)


def _batch_of(file: InputFile, first: int, lines: list[bytes], carry: Carried | None) -> Batch:
    def rows_made() -> Rows:
        return with_folders(file, verdicts(first, lines)[1])

    if carry is None and {line[:1] for line in lines} == {b"{"}:
        # None is blank, so it is known how many rows they are before anybody looks at one.
        return Batch(range(first, first + len(lines)), rows_made, None)
    numbers, rows = verdicts(first, lines)
    rows = with_folders(file, rows)
    return Batch(numbers, rows, carry.from_rows(rows) if carry else None)


def _read_table(
    file: InputFile, columns: Collection[str] | None, carry: Carried | None
) -> Iterator[Batch]:
    with open_table(file) as table:
        names = schema_of(file, table).names
        for_rows = [name for name in names if columns is None or name in columns]
        carried = carry.sources if carry else ()
        read_names = [name for name in names if name in for_rows or name in carried]
        own = [name for name in read_names if name in table.schema_arrow.names]
        done = 0
        for record in records(table, own):
            record = with_folder_columns(file, record, read_names)
            lines = range(done + 1, done + 1 + record.num_rows)
            done += record.num_rows
            rows = partial(rows_of, record.select(for_rows))
            yield Batch(lines, rows, carry.from_table(record) if carry else None)

"""The words of reading: a file, a row, a bad row, a batch of them. Nothing here opens anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import pyarrow as pa
from msgspec import Struct

from batchrun.config import Compression, InputFormat, JSONValue

BATCH_ROWS: Final = 1024
BATCH_BYTES: Final = 4 << 20
LINE_LIMIT_BYTES: Final = 64 << 20
READ_BYTES: Final = 1 << 20
SAMPLE: Final = "sample"  # the column that tells repetitions of a row apart


class BadRow(Struct, frozen=True, gc=False):
    """A line that is not a JSON object, and why: a code for programs, words for a person."""

    code: str
    reason: str


Row: TypeAlias = dict[str, JSONValue]
Rows: TypeAlias = list[Row | BadRow]


class Fingerprint(NamedTuple):
    """Changes when a file is written to or replaced."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


class InputFile(Struct, frozen=True):
    """One file to read. ``name`` is how people know it.

    ``folders`` are the columns that ``key=value`` folders on the way to it give to every row. A
    spool holds what came on stdin, or from a Python program.
    """

    path: Path
    name: str
    format: InputFormat
    compression: Compression
    fingerprint: Fingerprint
    size_bytes: int
    folders: tuple[tuple[str, str | None], ...] = ()
    is_spool: bool = False


class Resolved(NamedTuple):
    """The files of a run in reading order, and what directories and globs held besides."""

    files: list[InputFile]
    skipped: list[str]  # "data/old.parquet (made by batchrun)"


class Head(NamedTuple):
    """What a file begins with: its columns, and its first good rows."""

    columns: list[str]
    rows: list[Row]


def with_sample(schema: pa.Schema) -> pa.Schema:
    """What repeated rows carry."""
    return schema.append(pa.field(SAMPLE, pa.int32()))


class Batch:
    """At most 1,024 rows, in order.

    ``lines`` are 1-based: lines of a text, rows of a table. ``rows`` holds at least the
    columns asked for, and is often made only when first looked at.
    """

    __slots__ = ("_make", "_rows", "carried", "lines")

    def __init__(
        self,
        lines: Sequence[int],
        rows: Rows | Callable[[], Rows],
        carried: pa.RecordBatch | None,
    ) -> None:
        self.lines = lines
        self.carried = carried
        self._rows = rows if isinstance(rows, list) else None
        self._make = None if isinstance(rows, list) else rows

    @property
    def rows(self) -> Rows:
        if self._rows is None:
            assert self._make is not None
            self._rows = self._make()
            self._make = None
        return self._rows

    def __len__(self) -> int:
        return len(self.lines)

    def repeated(self, times: int) -> Batch:
        """Each row so many times, one after another, carrying which it is: ``SAMPLE``, from 0."""
        places = [at for at in range(len(self)) for _ in range(times)]
        each = self.take(places)
        if each.carried is not None:
            numbers = pa.array(list(range(times)) * len(self), pa.int32())
            arrays = [*each.carried.columns, numbers]
            schema = with_sample(each.carried.schema)
            each.carried = pa.RecordBatch.from_arrays(arrays, schema=schema)
        return each

    def take(self, places: Sequence[int]) -> Batch:
        """Only the rows at these places, in this order."""
        carried = self.carried
        return Batch(
            [self.lines[at] for at in places],
            lambda: [self.rows[at] for at in places],
            None if carried is None else carried.take(pa.array(places, pa.int64())),
        )


def with_folders(file: InputFile, rows: Rows) -> Rows:
    """The rows, fresh from reading, with the columns of the file's folders that they lack."""
    for name, value in file.folders:
        for row in rows:
            if type(row) is dict:
                row.setdefault(name, value)
    return rows

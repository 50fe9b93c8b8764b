"""Tables of text (RFC 4180) to rows: a header line names the columns, and every cell is text.

Nothing is guessed of a cell: ``007`` stays ``007``, and an empty one is empty text. Python's reader
splits, not Arrow's: that one is faster, and cannot say on which line a row begins.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import pyarrow as pa

from batchrun.config import INPUT_FORMATS
from batchrun.errors import UsageError
from batchrun.inputs import foreign
from batchrun.inputs.carried import Carried, TableColumns
from batchrun.inputs.lines import lines_of
from batchrun.inputs.rows import (
    LINE_LIMIT_BYTES,
    BadRow,
    Batch,
    Head,
    InputFile,
    Row,
    Rows,
    with_folders,
)
from batchrun.inputs.unpack import mapped_errors, opened, refusal, typed
from batchrun.words import count

if TYPE_CHECKING:
    from _csv import Reader

# The header says what a table has; its first rows serve only to advise.
_HEAD_ROWS: Final = 100
# Behind the comma: what Excel writes where a comma is part of numbers, and what others call CSV.
_CSV_DELIMITERS: Final = ",;\t|"
# By this line Excel is told the delimiter; it is no header.
_EXCEL_MARK: Final = re.compile(r"sep=(.)\r?\n")
# Brackets of JSON and HTML, and bytes that no text has; else a name may begin as it likes.
_NO_HEADER: Final = re.compile(rb"(?:\xef\xbb\xbf)?\s*[{<]|[^\n]*\0")


def head(file: InputFile, wanted: int) -> Head:
    """The columns of the header, and a few rows. UsageError for what is no table of text."""
    with mapped_errors(file), opened(file) as stream:
        start = stream.read(foreign.HEAD_BYTES)
    found = foreign.recognise(start)
    is_other = found is not None and found.suffix not in (".csv", ".tsv")
    if foreign.is_one_document(start) or (is_other and _NO_HEADER.match(start)):
        raise refusal(file, _label(file), start)
    table = _opened(file)
    _, rows = next(table.batches, ([], []))
    good = [row for row in rows if isinstance(row, dict)]
    return Head(table.columns, good[: min(wanted, _HEAD_ROWS)])


def read(
    file: InputFile, columns: Collection[str] | None, carry: Carried | None
) -> Iterator[Batch]:
    """All records, numbered by the lines they begin on, and all their columns.

    UsageError when the text is not UTF-8, or a quote is left open, wherever that is.
    """
    nothing = True
    for numbers, rows in _opened(file).batches:
        yield Batch(numbers, rows, carry.from_rows(rows) if carry else None)
        nothing = False
    if nothing:
        yield Batch([], [], carry.from_rows([]) if carry else None)


def columns_of(file: InputFile) -> TableColumns:
    """The columns of the header and of the file's folders, all of them text."""
    schema = pa.schema([pa.field(name, pa.string()) for name in _opened(file).columns])
    return TableColumns(schema, rounded=())


class _Table(NamedTuple):
    columns: list[str]
    batches: Iterator[tuple[list[int], Rows]]  # never an empty one


def _opened(file: InputFile) -> _Table:
    # The module's limit is one for the whole process, and shorter than prompts are.
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT_BYTES))
    lines = _Lines(file)
    texts = iter(lines)
    first = next(texts, "")
    if (mark := _EXCEL_MARK.fullmatch(first)) is not None:
        delimiter, lines_before = mark[1], 1
    else:
        delimiter, lines_before = _delimiter(file, first), 0
        texts = itertools.chain((first,), texts)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header = _header(file, reader)
    folders = [name for name, _ in file.folders if name not in header]
    return _Table([*header, *folders], _batches(file, lines, reader, header, lines_before))


def _delimiter(file: InputFile, header: str) -> str:
    if file.format == "tsv":
        return "\t"
    return next((mark for mark in _CSV_DELIMITERS if mark in header), ",")


class _Lines:
    """The lines of a text with their ends, which may belong to a cell."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self.pieces = 0  # read so far; each has the lines of at most one batch

    def __iter__(self) -> Iterator[str]:
        done = 0
        for lines, _ in lines_of(self._file, _label(self._file)):
            self.pieces += 1
            try:
                texts = [line.decode() + "\n" for line in lines]
            except UnicodeDecodeError as exc:
                # The line itself, for nobody else knows which of them it was.
                number = done + 1 + lines.index(exc.object)
                raise _not_utf8(self._file, number) from exc
            if max(map(len, lines), default=0) >= LINE_LIMIT_BYTES:
                number = done + 1 + max(range(len(lines)), key=lambda at: len(lines[at]))
                raise UsageError(f"{self._file.name} line {number}: {_TOO_LONG}")
            yield from texts
            done += len(lines)


def _header(file: InputFile, reader: Reader) -> list[str]:
    """The names of the columns, every one of them, and each once."""
    try:
        names = next(filter(None, reader), [])
    except csv.Error as exc:
        raise UsageError(f"{file.name}: the header is {_trouble(exc)}") from exc
    if not names:
        raise UsageError(f"{file.name}: is empty; its first line must name the columns")
    if "\0" in names[0]:
        encoding = "UTF-16BE" if names[0].startswith("\0") else "UTF-16LE"
        raise _not_utf8(file, reader.line_num, encoding)
    for at, name in enumerate(names, 1):
        if not name.strip():
            hint = "; pandas leaves it out with index=False" if at == 1 and len(names) > 1 else ""
            raise UsageError(
                f"{file.name}: column {at} has no name in the header; give it one{hint}"
            )
        if name in names[: at - 1]:
            raise UsageError(f'{file.name}: two columns are named "{name}"; rename one')
    return names


def _batches(
    file: InputFile, lines: _Lines, reader: Reader, header: list[str], lines_before: int
) -> Iterator[tuple[list[int], Rows]]:
    """Numbers and verdicts of the records, as many as begin in one piece of the text."""
    numbers: list[int] = []
    rows: Rows = []
    width = len(header)
    pieces = lines.pieces
    while True:
        number = lines_before + reader.line_num + 1
        row: Row | BadRow
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as exc:
            row = _broken(file, number, exc)
        else:
            if not cells:
                continue  # a blank line
            if len(cells) == width:
                row = dict(zip(header, cells, strict=True))
            else:
                has = count(len(cells), "cell")
                row = BadRow("ragged_row", f"{has}, and the header names {width}")
        if lines.pieces != pieces:
            pieces = lines.pieces
            if rows:
                yield numbers, with_folders(file, rows)
                numbers, rows = [], []
        numbers.append(number)
        rows.append(row)
    if rows:
        yield numbers, with_folders(file, rows)


_TOO_LONG: Final = f"longer than {LINE_LIMIT_BYTES >> 20} MB"


def _broken(file: InputFile, number: int, exc: csv.Error) -> BadRow:
    """The verdict on one record; UsageError when it took the rest of the file with it."""
    if "unexpected end" in str(exc) or "field limit" in str(exc):
        what = 'a quote is opened here that nothing closes; inside a cell it is written twice ("")'
        raise UsageError(f"{file.name} line {number}: {what}") from exc
    return BadRow("broken_csv", _trouble(exc))


def _trouble(exc: csv.Error) -> str:
    text = str(exc)
    if "new-line character" in text:
        return "broken: a carriage return outside of quotes"
    return "broken: text behind a closing quote" if "expected after" in text else f"broken: {text}"


def _not_utf8(file: InputFile, number: int, encoding: str = "WINDOWS-1252") -> UsageError:
    place = f"{file.name} line {number}"
    return foreign.not_utf8(typed(file), place, file.compression, encoding=encoding)


def _label(file: InputFile) -> str:
    return INPUT_FORMATS[file.format].label

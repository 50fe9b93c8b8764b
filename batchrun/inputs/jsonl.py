"""JSON lines, plain or compressed, to rows: decoded and judged line by line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Final, cast

import msgspec

from batchrun.config import JSONValue
from batchrun.inputs import foreign
from batchrun.inputs.carried import Carried
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
from batchrun.inputs.unpack import mapped_errors, opened, refusal
from batchrun.words import kind

_CLAIMED: Final = "JSON lines"
_HEAD_BYTES: Final = 32 << 20
# Deeper values decode in one place and overflow the stack in the next.
_DEPTH_LIMIT: Final = 400
_SHALLOW_BYTES: Final = 2 * _DEPTH_LIMIT
_decode: Final = msgspec.json.Decoder().decode
_ONLY_OBJECTS: Final = {dict}


def head(file: InputFile, wanted: int) -> Head:
    """The keys of the first good rows, in order of appearance.

    UsageError for a file that has lines, and no JSON object among them.
    """
    good: list[Row] = []
    first_bad: tuple[int, BadRow] | None = None
    size_bytes = 0
    with mapped_errors(file), opened(file) as stream:
        start = stream.read(foreign.HEAD_BYTES)
    if foreign.is_one_document(start):
        raise refusal(file, _CLAIMED, start)
    first = 1
    for lines, batch_bytes in lines_of(file, _CLAIMED):
        numbers, rows = verdicts(first, lines)
        first += len(lines)
        good += [row for row in with_folders(file, rows) if isinstance(row, dict)]
        if rows and not good and first_bad is None:
            first_bad = numbers[0], cast("BadRow", rows[0])
        size_bytes += batch_bytes
        if len(good) >= wanted or (good and size_bytes >= _HEAD_BYTES):
            break
    if first_bad is not None and not good:
        number, row = first_bad
        why = f"no line of it is a JSON object (line {number}: {row.reason})"
        raise refusal(file, _CLAIMED, start, why)
    del good[wanted:]
    return Head(list(dict.fromkeys(itertools.chain.from_iterable(good))), good)


def read(
    file: InputFile, columns: Collection[str] | None, carry: Carried | None
) -> Iterator[Batch]:
    """Every line that is not blank. A row has all its columns, whichever are asked for."""
    nothing = True
    first = 1
    for lines, _ in lines_of(file, _CLAIMED):
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


def bears_our_mark(path: Path) -> bool:
    """Whether the first line is of an output."""
    try:
        with path.open("rb") as lines:
            first = msgspec.json.decode(lines.readline(LINE_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return False  # reading it as an input will say what is wrong
    mark = first.get("batchrun") if isinstance(first, dict) else None
    return isinstance(mark, dict) and "request_hash" in mark


def verdicts(first: int, lines: list[bytes]) -> tuple[Sequence[int], Rows]:
    """Number and verdict of every line that is not blank."""
    try:
        # One call for all: nearly every line is an object, and a short one cannot nest deeply.
        values = list(map(_decode, lines))
    except (ValueError, RecursionError):
        values = []
    if values and set(map(type, values)) == _ONLY_OBJECTS:
        if max(map(len, lines)) > _SHALLOW_BYTES:
            values = list(map(_checked, lines, values))
        return range(first, first + len(lines)), values
    told = [(n, _row(line)) for n, line in enumerate(lines, first) if line and not line.isspace()]
    return [number for number, _ in told], [row for _, row in told]


def _row(line: bytes) -> Row | BadRow:
    """The verdict on one line."""
    try:
        value = _decode(line)
    except (ValueError, RecursionError):
        # msgspec also refuses what is JSON: 1e400, escapes of lone surrogates; and NaN.
        value = _decoded_slowly(line)
    return _checked(line, value)


def _checked(line: bytes, value: JSONValue | Decimal | BadRow) -> Row | BadRow:
    """``value`` if it is an object and within the limits."""
    if len(line) >= LINE_LIMIT_BYTES:
        return BadRow("too_long", f"longer than {LINE_LIMIT_BYTES >> 20} MB")
    if isinstance(value, dict):
        nested = len(line) > _SHALLOW_BYTES and line.count(b"[") + line.count(b"{")
        if nested > _DEPTH_LIMIT and _is_deep(value):
            return BadRow("too_deep", f"nested more than {_DEPTH_LIMIT} levels deep")
        return value
    if isinstance(value, BadRow):
        return value
    return BadRow("not_an_object", f"{kind(value)}, not an object")


def _decoded_slowly(line: bytes) -> JSONValue | Decimal | BadRow:
    try:
        text = line.rstrip(b"\r").decode()
    except UnicodeDecodeError as exc:
        return BadRow("not_utf8", f"not UTF-8 at byte {exc.start + 1}")
    try:
        value: JSONValue = json.loads(text, parse_float=_float)
    except json.JSONDecodeError as exc:
        what = "a NUL byte" if text[exc.pos : exc.pos + 1] == "\0" else "broken JSON"
        return BadRow("broken_json", f"{what} at column {exc.colno}")
    except RecursionError:
        return BadRow("too_deep", f"nested more than {_DEPTH_LIMIT} levels deep")
    except (ValueError, InvalidOperation):
        return BadRow("long_number", "a number of too many digits")
    return value


def _float(digits: str) -> float | Decimal:
    """A double, or what a double cannot hold as it was written."""
    value = float(digits)
    return Decimal(digits) if value in (float("inf"), float("-inf")) else value


def _is_deep(value: JSONValue) -> bool:
    level: list[JSONValue] = [value]
    for _ in range(_DEPTH_LIMIT):
        below: list[JSONValue] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return False
        level = below
    return True

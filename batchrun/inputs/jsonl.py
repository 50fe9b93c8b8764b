"""JSON lines, plain or compressed, to rows: split, decoded and judged line by line."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import msgspec
import pyarrow as pa

from batchrun.config import JSONValue
from batchrun.errors import UsageError
from batchrun.inputs import foreign
from batchrun.inputs.rows import (
    BATCH_BYTES,
    BATCH_ROWS,
    LINE_LIMIT_BYTES,
    READ_BYTES,
    BadRow,
    Compression,
    InputFile,
    Row,
    Rows,
)
from batchrun.inputs.trouble import mapped_errors, unreadable

# Split into lines at once: more leaves the processor's cache.
_PIECE_BYTES: Final = 256 << 10


# Deeper values decode in one place and overflow the stack in the next.
_DEPTH_LIMIT: Final = 400


_SHALLOW_BYTES: Final = 2 * _DEPTH_LIMIT


_COMPRESSED: Final[Mapping[bytes, Compression]] = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
}


_CLAIMED: Final[Mapping[str, str]] = {"gz": "gzip data", "zst": "zstd data"}


def groups(file: InputFile) -> Iterator[tuple[Sequence[int], Rows, int]]:
    """Numbers and verdicts of the lines that are not blank, by the batch, and its bytes."""
    first = 1
    for lines, size_bytes in lines_of(file):
        numbers, rows = verdicts(first, lines)
        first += len(lines)
        if rows:
            yield numbers, with_folders(file, rows), size_bytes


def with_folders(file: InputFile, rows: Rows) -> Rows:
    """The rows, fresh from reading, with the columns of the file's folders that they lack."""
    for name, value in file.folders:
        for row in rows:
            if type(row) is dict:
                row.setdefault(name, value)
    return rows


def lines_of(file: InputFile) -> Iterator[tuple[list[bytes], int]]:
    """All lines, as many at a time as make a batch, and their bytes; over-long ones cut."""
    with mapped_errors(file), opened(file) as stream:
        start = stream.read(_PIECE_BYTES)
        if foreign.is_no_text(start):
            raise refusal(file, "JSON lines", start[: foreign.HEAD_BYTES])
        more = iter(partial(stream.read, _PIECE_BYTES), b"")
        waiting: list[bytes] = []
        size_bytes = 0
        for lines in _split(itertools.chain((start.removeprefix(b"\xef\xbb\xbf"),), more)):
            waiting += lines
            size_bytes += sum(map(len, lines))
            while len(waiting) >= BATCH_ROWS or size_bytes >= BATCH_BYTES:
                batch = waiting[:BATCH_ROWS]
                del waiting[:BATCH_ROWS]
                batch_bytes = sum(map(len, batch))
                size_bytes -= batch_bytes
                yield batch, batch_bytes
        yield waiting, size_bytes


def _split(pieces: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The lines of a text without their ends; of one over the limit, as much as is over it."""
    begun: list[bytes] = []
    begun_bytes = 0
    for piece in pieces:
        lines = piece.split(b"\n")
        rest = lines.pop()
        if lines:
            if begun:
                lines[0] = b"".join((*begun, lines[0]))
                begun, begun_bytes = [], 0
            yield lines
        if rest and begun_bytes < LINE_LIMIT_BYTES:
            begun.append(rest)
            begun_bytes += len(rest)
    if begun:
        yield [b"".join(begun)]


_decode: Final = msgspec.json.Decoder().decode


_ONLY_OBJECTS: Final = {dict}


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
    return BadRow("not_an_object", f"{_KINDS[type(value)]}, not an object")


_KINDS: Final[Mapping[type, str]] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    str: "text",
    list: "a list",
}


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


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@contextmanager
def opened(file: InputFile) -> Iterator[_Stream]:
    """The file's bytes, unpacked. Errors of what is packed are for ``_mapped_errors``."""
    with file.path.open("rb", buffering=READ_BYTES) as raw:
        if not file.compression:
            yield raw
            return
        start = raw.read(4)
        raw.seek(0)
        if not start:
            raise EOFError("not even a header")
        if compression_of(start) != file.compression:
            claimed = _CLAIMED[file.compression]
            raise refusal(file, claimed, raw.read(foreign.HEAD_BYTES))
        if file.compression == "gz":
            with gzip.open(raw) as unpacked:
                yield io.BufferedReader(unpacked, READ_BYTES)
        else:
            with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as unpacked:
                yield unpacked


def refusal(file: InputFile, claimed: str, start: bytes, otherwise: str = "") -> UsageError:
    """What to do about a file that is not what its name says; a spool has no name to type."""
    typed = None if file.name == file.path.stem else file.path
    return foreign.refusal(typed, file.name, claimed, start, otherwise)


def compression_of(start: bytes) -> Compression:
    return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), "")


def start_of(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(foreign.HEAD_BYTES)
    except OSError as exc:
        raise unreadable(name, exc) from exc

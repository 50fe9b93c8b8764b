"""The output as OpenAI batch output lines with the extra member ``batchrun``, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

import msgspec
import pyarrow as pa
from msgspec import Raw, Struct

from batchrun import chat
from batchrun.chat import Api
from batchrun.errors import LocalIOError
from batchrun.outputs.columns import (
    COLUMNS,
    COUNT,
    INSTANT,
    PAID_BY,
    SECONDS,
    SMALL,
    TEXT,
    Column,
    settled,
    told_once,
)
from batchrun.outputs.footer import Footer, footer, footer_json
from batchrun.outputs.parsed import PREFIX
from batchrun.outputs.rows import ANSWERED, InvalidRow, Rows, Slice, cleaned
from batchrun.outputs.target import Sink, reading
from batchrun.types import NO_USAGE, Outcome, Usage

# Lines read at once, in bytes: an answer may be long.
READ_BYTES = 1_000_000


class _Response(Struct):
    status_code: int | None = None
    request_id: str | None = None
    body: Raw | str | None = None


class _Error(Struct):
    code: str | None = None
    message: str | None = None


_EXTRA: Final = [column for column in (*COLUMNS, PAID_BY) if column.extra]
_PYTHON: Final = {TEXT: str, COUNT: int, SMALL: int, SECONDS: float, INSTANT: datetime}


# The member ``batchrun``: what OpenAI's batch lines have no place for.
JsonMember: Final = msgspec.defstruct(
    "JsonMember",
    [
        *((column.name, _PYTHON[column.type] | None, None) for column in _EXTRA),
        ("usage", Usage | None, None),  # where the body does not tell it: see ``_untold``
        ("rebuilt", bool, False),  # the body holds the answer columns only
        ("parsed", dict[str, object] | None, None),
        ("input", dict[str, object] | None, None),
    ],
    omit_defaults=True,
)


class _JsonLine(Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None
    batchrun: Struct  # the last member, for the last line's sake


class JsonlWriter:
    """OpenAI batch output lines. The last one waits: the footer becomes its ``batchrun.run``."""

    def __init__(
        self, sink: Sink, response_body: bool, api: Api, more: Sequence[Column] = ()
    ) -> None:
        self._parsed = [column for column in more if column is not PAID_BY]
        self._sink = sink
        self._response_body = response_body
        self._api = api
        self._encode = msgspec.json.Encoder(enc_hook=str).encode
        self._written = 0
        self._last = b""

    def write(self, rows: Rows, carried: pa.RecordBatch | None) -> None:
        try:
            new = self._lines(rows, carried)
        except UnicodeEncodeError:
            new = self._lines(cleaned(rows), carried)
        self._written += len(new)
        lines = [self._last, *new] if self._last else new
        self._last = lines.pop()
        if lines:
            self._sink.write(b"\n".join(lines) + b"\n")

    def finish(self, footer: Footer) -> None:
        if self._last:
            run = b',"run":' + footer_json(footer)
            self._sink.write(self._last[:-2] + run + b"}}\n")

    def _lines(self, rows: Rows, carried: pa.RecordBatch | None) -> list[bytes]:
        encode = self._encode
        bodies = [self._body(rows, at) for at in range(len(rows.outcomes))]
        lines = zip(
            rows.custom_ids,
            rows.outcomes,
            rows.failed,
            bodies,
            self._members(rows, bodies, carried),
            strict=True,
        )
        return [
            encode(
                _JsonLine(
                    f"batch_req_{number}",
                    custom_id,
                    _response(outcome, body),
                    _Error(failed.code or None, failed.message or None) if failed else None,
                    member,
                )
            )
            for number, (custom_id, outcome, failed, body, member) in enumerate(
                lines, self._written + 1
            )
        ]

    def _members(
        self, rows: Rows, bodies: list[Raw | str | None], carried: pa.RecordBatch | None
    ) -> Iterator[Struct]:
        columns = [column.values(rows) for column in _EXTRA]
        for at, column in enumerate(_EXTRA):
            if column.type == INSTANT:
                columns[at] = list(map(_instant, columns[at]))
        usages = map(self._untold, rows.outcomes, bodies, rows.paid_by)
        rebuilt = [self._is_rebuilt(outcome) for outcome in rows.outcomes]
        inputs = _carried_rows(carried, len(bodies))
        return map(JsonMember, *columns, usages, rebuilt, self._objects(rows), inputs)

    def _untold(self, outcome: Outcome, body: Raw | str | None, payer: str | None) -> Usage | None:
        """The usage, where the line's body does not tell it."""
        told = NO_USAGE
        if body is not None and payer is None:
            rebuilt = self._is_rebuilt(outcome)
            told = outcome.usage if rebuilt else self._api.parse(outcome.body).usage
        return None if outcome.usage in (told, NO_USAGE) else outcome.usage

    def _objects(self, rows: Rows) -> Iterator[dict[str, object] | None]:
        if not self._parsed:
            return iter([None] * len(rows.outcomes))
        names = [column.name.removeprefix(PREFIX) for column in self._parsed]
        values = zip(*(column.values(rows) for column in self._parsed), strict=True)
        return (
            dict(zip(names, each, strict=True)) if failed is None else None
            for failed, each in zip(rows.failed, values, strict=True)
        )

    def _is_rebuilt(self, outcome: Outcome) -> bool:
        return outcome.kind in ANSWERED and (outcome.rebuilt or not self._response_body)

    def _body(self, rows: Rows, at: int) -> Raw | str | None:
        outcome = rows.outcomes[at]
        if self._is_rebuilt(outcome):
            return Raw(self._api.rebuild(rows.answer(at)))
        if not outcome.body or not self._response_body:
            return None
        spliced = chat.body_json(outcome.body)
        # A body that is no object or array, an HTML page for instance, is the text of it.
        return chat.body_text(outcome.body) if spliced is None else Raw(spliced)


def _response(outcome: Outcome, body: Raw | str | None) -> _Response | None:
    if outcome.http_status is None and body is None:
        return None
    return _Response(outcome.http_status, outcome.request_id or None, body)


def _instant(unix_ms: int | None) -> datetime | None:
    # A double holds today's seconds to a quarter of a microsecond: the milliseconds stay exact.
    return datetime.fromtimestamp(unix_ms / 1000, UTC) if unix_ms else None


def _carried_rows(carried: pa.RecordBatch | None, rows: int) -> Iterator[dict[str, object] | None]:
    if carried is None or not carried.num_columns:
        return iter([None] * rows)
    names = carried.schema.names
    columns = [_values(column) for column in carried.columns]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: pa.Array) -> list[object]:
    try:
        return cast("list[object]", column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        # Nanoseconds, and years that datetime does not have.
        return [None if not value.is_valid else _scalar_text(value) for value in column]


def _scalar_text(value: pa.Scalar) -> str:
    try:
        return cast("str", value.cast(pa.string()).as_py())
    except (ValueError, pa.ArrowException):
        return str(value)


class _Run(Struct):
    run: Raw = Raw(b"")


class _LastLine(Struct):
    batchrun: _Run | None = None


def jsonl_footer(file: BinaryIO) -> Footer | None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return Footer(complete=False)
    try:
        line = msgspec.json.decode(_last_line(file, size), type=_LastLine)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return None if line.batchrun is None else footer(bytes(line.batchrun.run))


def _last_line(file: BinaryIO, size: int) -> bytes:
    """The last line, read from the end: it holds a whole answer and may be long."""
    length = 64_000
    while True:
        file.seek(max(0, size - length))
        tail = file.read().rstrip(b"\n")
        at = tail.rfind(b"\n")
        if at >= 0 or length >= size:
            return tail[at + 1 :]
        length *= 8


class _Told(Struct):
    status_code: int | None = None
    request_id: str | None = None
    body: Raw = Raw(b"null")


class _BackLine(Struct):
    batchrun: JsonMember  # type: ignore[valid-type]  # made from the table of columns
    custom_id: str = ""
    response: _Told | None = None
    error: _Error | None = None


class Untyped(NamedTuple):
    """Rows of a published file without what they carry: that has values there, but no types."""

    rows: Slice
    carried: list[dict[str, Any]]


def jsonl_outcomes(path: Path, api: Api) -> Iterator[Outcome]:
    """What a published file holds, in order: see ``told_once``."""
    for piece in _read(path):
        yield from told_once(_settled(piece, api), _payers(piece))


def jsonl_slices(path: Path, api: Api) -> Iterator[Untyped]:
    """A published file as what ``publish`` takes, but for the types of its carried columns."""
    for piece in _read(path):
        custom_ids = [line.custom_id for line in piece.lines]
        extras: list[Any] = [line.batchrun for line in piece.lines]
        sources = [f"{path}:{piece.first + at}" for at in range(len(piece.lines))]
        payers = _payers(piece)
        rows = Slice(None, custom_ids, sources, _settled(piece, api), payers)
        yield Untyped(rows, [extra.input or {} for extra in extras])


class _Piece(NamedTuple):
    first: int  # number of the first line, from 1
    lines: list[_BackLine]
    bodies: list[bytes]


def _payers(piece: _Piece) -> list[str | None]:
    return [cast("Any", line.batchrun).paid_by for line in piece.lines]


_decode: Final = msgspec.json.Decoder(_BackLine).decode


def _read(path: Path) -> Iterator[_Piece]:
    piece = _Piece(1, [], [])
    with reading(path), path.open("rb") as file:
        while texts := file.readlines(READ_BYTES):
            piece = _Piece(piece.first + len(piece.lines), [], [])
            for text in texts:
                try:
                    line = _decode(text)
                    body = _sent(line.response.body) if line.response else b""
                except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
                    number = piece.first + len(piece.lines)
                    raise LocalIOError(
                        f"{path} line {number}: not a line batchrun wrote; "
                        "its answers cannot be reused"
                    ) from exc
                piece.lines.append(line)
                piece.bodies.append(body)
            yield piece


def _sent(body: Raw) -> bytes:
    """The endpoint's bytes, which are text in the line where they are no object or array."""
    spliced = bytes(body)
    if spliced == b"null":
        return b""
    return msgspec.json.decode(spliced, type=str).encode() if spliced[:1] == b'"' else spliced


def _settled(piece: _Piece, api: Api) -> list[Outcome | InvalidRow]:
    lines = piece.lines
    members = zip(*(msgspec.structs.astuple(line.batchrun) for line in lines), strict=True)
    table: dict[str, Sequence[Any]] = dict(zip(JsonMember.__struct_fields__, members, strict=True))
    responses = [line.response or _Told() for line in lines]
    errors = [line.error or _Error() for line in lines]
    table["finished_at"] = list(map(_unix_ms, table["finished_at"]))
    table["http_status"] = [each.status_code for each in responses]
    table["request_id"] = [each.request_id for each in responses]
    table["error_code"] = [each.code for each in errors]
    table["error_message"] = [each.message for each in errors]
    usages = [
        usage or (api.parse(body).usage if payer is None else NO_USAGE)
        for usage, body, payer in zip(table["usage"], piece.bodies, table["paid_by"], strict=True)
    ]
    return settled(table, usages, piece.bodies, table["rebuilt"])


def _unix_ms(instant: datetime | None) -> int | None:
    return None if instant is None else round(instant.timestamp() * 1000)

"""The output as OpenAI batch output lines, with the extra member ``batchrun``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import cast

import msgspec
import pyarrow as pa
from msgspec import Raw, Struct
from msgspec.structs import replace

from batchrun import chat
from batchrun.chat import Api
from batchrun.outputs.footer import Footer, footer_json
from batchrun.outputs.rows import Row, Rows, clean_row
from batchrun.outputs.tally import INVALID_INPUT
from batchrun.outputs.target import Sink
from batchrun.types import NO_USAGE, Outcome, Usage


class _JsonResponse(Struct):
    status_code: int | None = None
    request_id: str | None = None
    body: Raw | str | None = None


class JsonError(Struct):
    code: str | None = None
    message: str | None = None


class JsonMember(Struct, omit_defaults=True):
    """The member ``batchrun``: what OpenAI's batch lines have no place for."""

    status: str
    request_hash: str | None = None
    request_model: str | None = None
    error_kind: str | None = None
    attempts: int = -1  # never left out
    in_doubt_attempts: int = -1  # never left out
    latency_s: float | None = None
    ttft_s: float | None = None
    finished_at: datetime | None = None
    usage: Usage | None = None  # of an attempt whose body is not there to tell
    rebuilt: bool = False  # the body holds the answer columns only
    input: dict[str, object] | None = None


class _JsonLine(Struct):
    id: str
    custom_id: str
    response: _JsonResponse | None
    error: JsonError | None
    batchrun: JsonMember  # the last member, for the last line's sake


class JsonlWriter:
    """OpenAI batch output lines. The last one waits: the footer becomes its ``batchrun.run``."""

    def __init__(self, sink: Sink, response_body: bool, api: Api) -> None:
        self._sink = sink
        self._rebuild = api.rebuild
        self._response_body = response_body
        self._encode = msgspec.json.Encoder(enc_hook=str).encode
        self._written = 0
        self._last = b""

    def write(self, rows: Rows, carried: pa.RecordBatch | None) -> None:
        inputs = _carried_rows(carried, len(rows.outcomes))
        lines = [self._last] if self._last else []
        for row, carried_row in zip(rows.one_by_one(), inputs, strict=True):
            self._written += 1
            lines.append(self._line(row, carried_row))
        self._last = lines.pop()
        if lines:
            self._sink.write(b"\n".join(lines) + b"\n")

    def finish(self, footer: Footer) -> None:
        if self._last:
            run = b',"run":' + footer_json(footer)
            self._sink.write(self._last[:-2] + run + b"}}\n")

    def _line(self, row: Row, carried: dict[str, object] | None) -> bytes:
        line = self._made(row, carried)
        try:
            return self._encode(line)
        except UnicodeEncodeError:
            return self._encode(self._made(clean_row(row), carried))

    def _made(self, row: Row, carried: dict[str, object] | None) -> _JsonLine:
        identity = f"batch_req_{self._written}"
        outcome = row.outcome
        if not outcome.hash:
            member = JsonMember(
                "error",
                error_kind=INVALID_INPUT,
                attempts=0,
                in_doubt_attempts=0,
                input=carried,
            )
            error = JsonError(outcome.code or None, row.message)
            return _JsonLine(identity, row.custom_id, None, error, member)
        is_ok = outcome.kind == "ok"
        rebuilt = is_ok and (outcome.rebuilt or not self._response_body)
        body = self._body(row, outcome, rebuilt)
        member = JsonMember(
            "ok" if is_ok else "error",
            chat.format_hash(outcome.hash),
            outcome.model or None,
            None if is_ok else outcome.kind,
            outcome.attempts,
            outcome.in_doubt,
            outcome.latency_s,
            outcome.ttft_s,
            _instant(outcome.finished_at_ms),
            outcome.usage if body is None and outcome.usage != NO_USAGE else None,
            rebuilt,
            carried,
        )
        failure = None if is_ok else JsonError(outcome.code or None, row.message or None)
        response = _JsonResponse(outcome.http_status, outcome.request_id or None, body)
        said = outcome.http_status is not None or body is not None
        return _JsonLine(identity, row.custom_id, response if said else None, failure, member)

    def _body(self, row: Row, outcome: Outcome, rebuilt: bool) -> Raw | str | None:
        if rebuilt:
            return Raw(self._rebuild(replace(row.answer, usage=outcome.usage)))
        if not outcome.body or not self._response_body:
            return None
        spliced = chat.body_json(outcome.body)
        # A body that is no object or array, an HTML page for instance, is the text of it.
        return chat.body_text(outcome.body) if spliced is None else Raw(spliced)


def _instant(unix_ms: int) -> datetime | None:
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

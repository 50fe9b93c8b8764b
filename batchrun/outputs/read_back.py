"""A published output, read back into outcomes: the memory of the next run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Raw, Struct

from batchrun import chat
from batchrun.chat import CHAT, Api
from batchrun.errors import LocalIOError
from batchrun.files import open_regular
from batchrun.outputs.footer import FOOTER_KEY, Footer, footer
from batchrun.outputs.jsonl import JsonError, JsonMember
from batchrun.outputs.rows import GROUP_ROWS, PIECE_ROWS, InvalidRow, Slice
from batchrun.outputs.target import reading
from batchrun.types import Answer, Outcome, OutcomeKind, Usage

_PASSING: Final[frozenset[str]] = frozenset(
    {"rate_limit", "transient", "timeout", "invalid_response"}
)


def recognise(path: Path) -> Footer | None:
    """The footer of a file batchrun wrote; None for any other. LocalIOError when unreadable."""
    with reading(path), open(open_regular(path.resolve(), os.O_RDONLY), "rb") as file:
        if file.read(4) == b"PAR1":
            return _parquet_footer(path)
        return _jsonl_footer(file)


PARTIAL_SUFFIX = ".partial"


def partial_of(output: Path) -> Path:
    """Where ``collect`` writes what a run of ``output`` holds so far."""
    suffix = output.suffix or ".parquet"
    return output.with_name(f"{output.name.removesuffix(suffix)}{PARTIAL_SUFFIX}{suffix}")


def remove_partial(output: Path, run_id: str) -> Path | None:
    """Remove what ``collect`` wrote of this very run; the path of a partial file of another.

    A file that says nothing of the kind, or is reached through a link, is somebody else's.
    """
    path = partial_of(output)
    if path.is_symlink() or not path.is_file():
        return None
    footer = recognise(path)
    if footer is None or footer.complete or not footer.run_id:
        return None
    if footer.run_id != run_id:
        return path
    path.unlink(missing_ok=True)
    return None


def read_back(path: Path, api: Api = CHAT) -> Iterator[Outcome]:
    """Yield what a published file holds, in order, as a journal would hold it.

    Left out are rows of invalid input and rows whose ``request_hash`` has another version.
    ``occurrence`` is 0 throughout: numbering equal hashes is the caller's. An answer published
    without ``response_body`` comes with a body put together from its columns, ``rebuilt`` set.
    """
    with reading(path):
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        yield from _read_parquet(path, api) if is_parquet else _read_jsonl(path, api)


ASIDE_SCHEMA: Final[pa.Schema] = pa.schema([("unused_since", pa.timestamp("ms", tz="UTC"))])


_MARK_COLUMNS = ("request_hash", "finished_at", "request_id", "unused_since")


class Mark(NamedTuple):
    """What tells an answer set aside from every other, and when its row was gone."""

    hash: bytes
    finished_at_ms: int
    request_id: str
    since_ms: int


def aside_slice(outcomes: Sequence[Outcome], since_ms: Sequence[int]) -> Slice:
    """Answers whose rows are gone, to be published with ASIDE_SCHEMA."""
    since = pa.array(since_ms, ASIDE_SCHEMA.field(0).type)
    hashes = [chat.format_hash(outcome.hash) for outcome in outcomes]
    carried = pa.RecordBatch.from_arrays([since], schema=ASIDE_SCHEMA)
    return Slice(carried, hashes, hashes, outcomes)


def read_marks(path: Path) -> Iterator[list[Mark]]:
    """The marks of the rows that ``read_back`` gives of a file set aside, in the same order."""
    with reading(path), _parquet(path) as file:
        for batch in file.iter_batches(GROUP_ROWS, columns=_MARK_COLUMNS, use_threads=False):
            hashes, ended, ids, since = (_back_values(batch[name], name) for name in _MARK_COLUMNS)
            digests = [chat.parse_hash(text or "") for text in hashes]
            yield [
                Mark(digest, at or 0, identity or "", left or 0)
                for digest, at, identity, left in zip(digests, ended, ids, since, strict=True)
                if digest is not None
            ]


def read_wanted(
    path: Path, is_wanted: Callable[[bytes], bool], api: Api = CHAT
) -> Iterator[list[Outcome]]:
    """What ``read_back`` gives of a Parquet file, only of wanted hashes; a row group at a time."""
    with reading(path), _parquet(path) as file:
        for group in range(file.num_row_groups):
            hashes = file.read_row_group(group, columns=["request_hash"], use_threads=False)
            texts = hashes.column(0).to_pylist()
            digests = map(chat.parse_hash, filter(None, texts))
            wanted = {digest for digest in digests if digest is not None and is_wanted(digest)}
            if wanted:
                found = _outcomes_of(file, [group], api)
                yield [outcome for outcome in found if outcome.hash in wanted]


class PublishedRow(NamedTuple):
    """One row of a published JSONL file, to be published again."""

    custom_id: str
    source: str
    outcome: Outcome | InvalidRow
    carried: dict[str, Any]


def slices_of(path: Path, api: Api = CHAT) -> tuple[pa.Schema, Iterator[Slice]]:
    """A published Parquet file as what ``publish`` takes, to write it in another format."""
    with reading(path), path.open("rb") as raw:
        schema = pq.read_schema(raw)
    own = set(chat.ANSWER_COLUMNS)
    fields = [field for field in schema if field.name not in own]
    carried = pa.schema(fields, metadata=schema.metadata)
    return carried, table_slices(path, carried, api)


def published_rows(path: Path, api: Api = CHAT) -> Iterator[PublishedRow]:
    """The rows of a published JSONL file, in order."""
    decode = msgspec.json.Decoder(_BackLine).decode
    with reading(path), path.open("rb") as file:
        for number, text in enumerate(file, 1):
            line = decode(text)
            message = line.error.message if line.error else None
            code = line.error.code if line.error else None
            outcome = _outcome_of_line(line, api) or _invalid(code, message)
            carried = line.batchrun.input or {}
            source = source_of(outcome, message, f"{path}:{number}")
            yield PublishedRow(line.custom_id, source, outcome, carried)


_BACK_COLUMNS = tuple(name for name in chat.ANSWER_COLUMNS if name != "custom_id")


def _parquet_footer(path: Path) -> Footer | None:
    try:
        with path.open("rb") as raw:
            metadata = pq.read_metadata(raw).metadata or {}
    except pa.ArrowException:
        return None
    return footer(metadata.get(FOOTER_KEY, b""))


class _Run(Struct):
    run: Raw = Raw(b"")


class _LastLine(Struct):
    batchrun: _Run | None = None


def _jsonl_footer(file: BinaryIO) -> Footer | None:
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


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    with (
        path.open("rb") as raw,
        pq.ParquetFile(raw, pre_buffer=False, buffer_size=256_000) as file,
    ):
        yield file


def _read_parquet(path: Path, api: Api) -> Iterator[Outcome]:
    with _parquet(path) as file:
        yield from _outcomes_of(file, None, api)


def _outcomes_of(file: pq.ParquetFile, groups: list[int] | None, api: Api) -> Iterator[Outcome]:
    present = [name for name in _BACK_COLUMNS if name in file.schema_arrow.names]
    for batch in file.iter_batches(
        PIECE_ROWS, row_groups=groups, columns=present, use_threads=False
    ):
        columns = {name: _back_values(batch.column(name), name) for name in present}
        absent = [None] * batch.num_rows
        rows = zip(*[columns.get(name, absent) for name in _BACK_COLUMNS], strict=True)
        for row in rows:
            outcome = _outcome_of(_Published(*row), api)
            if outcome is not None:
                yield outcome


def table_slices(path: Path, carried: pa.Schema, api: Api) -> Iterator[Slice]:
    done = 0
    with (
        reading(path),
        path.open("rb") as raw,
        pq.ParquetFile(raw, pre_buffer=False, buffer_size=256_000) as file,
    ):
        for batch in file.iter_batches(PIECE_ROWS, use_threads=False):
            names = batch.schema.names
            absent = [None] * batch.num_rows
            rows = zip(
                *[
                    _back_values(batch.column(name), name) if name in names else absent
                    for name in _BACK_COLUMNS
                ],
                strict=True,
            )
            outcomes: list[Outcome | InvalidRow] = []
            places = []
            for row in rows:
                done += 1
                published = _Published(*row)
                message = published.error_message
                outcome = _outcome_of(published, api) or _invalid(published.error_code, message)
                outcomes.append(outcome)
                places.append(source_of(outcome, message, f"{path}:{done}"))
            custom_ids = batch.column("custom_id").to_pylist()
            yield Slice(batch.select(carried.names), custom_ids, places, outcomes)


# An invalid row is published as "file:line: reason"; published again it must say that once.
_PLACED: Final = re.compile(r"(.+?:\d+): (.*)", re.DOTALL)


def _invalid(code: str | None, message: str | None) -> InvalidRow:
    match = _PLACED.fullmatch(message or "")
    return InvalidRow(code or "", match[2] if match else message or "")


def source_of(outcome: Outcome | InvalidRow, message: str | None, otherwise: str) -> str:
    match = _PLACED.fullmatch(message or "") if type(outcome) is InvalidRow else None
    return match[1] if match else otherwise


def _back_values(column: pa.Array, name: str) -> list[Any]:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ms", tz="UTC")).cast(pa.int64())
    return cast("list[Any]", column.to_pylist())


class _Published(NamedTuple):
    """One published row, the columns after ``custom_id``; null where nothing was reported."""

    status: str
    response: str | None
    finish_reason: str | None
    request_model: str | None
    response_model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    reasoning: str | None
    tool_calls: str | None
    error_kind: str | None
    error_code: str | None
    error_message: str | None
    http_status: int | None
    attempts: int | None
    in_doubt_attempts: int | None
    latency_s: float | None
    ttft_s: float | None
    request_id: str | None
    finished_at: int | None
    request_hash: str | None
    response_body: str | None


def _outcome_of(row: _Published, api: Api) -> Outcome | None:
    digest = chat.parse_hash(row.request_hash) if row.request_hash else None
    if digest is None:
        return None
    kind = _kind(row.status, row.error_kind)
    usage = Usage(
        row.prompt_tokens,
        row.completion_tokens,
        row.total_tokens,
        row.cached_tokens,
        row.reasoning_tokens,
    )
    rebuilt = kind == "ok" and row.response_body is None
    if rebuilt:
        answer = Answer(
            row.response,
            row.finish_reason,
            row.response_model,
            usage,
            row.reasoning,
            row.tool_calls,
        )
        body = api.rebuild(answer)
    else:
        body = (row.response_body or "").encode()
    return Outcome(
        hash=digest,
        occurrence=0,
        kind=kind,
        final=_is_final(kind, row.error_code),
        attempts=row.attempts or 0,
        in_doubt=row.in_doubt_attempts or 0,
        http_status=row.http_status,
        code=row.error_code or "",
        message=row.error_message or "",
        request_id=row.request_id or "",
        model=row.request_model or "",
        latency_s=row.latency_s,
        ttft_s=row.ttft_s,
        finished_at_ms=row.finished_at or 0,
        usage=usage,
        body=body,
        rebuilt=rebuilt,
    )


def _is_final(kind: OutcomeKind, code: str | None) -> bool:
    # Version 0.1 named a spent doubt budget in the code. Since then the attempts in doubt say it,
    # and whoever plans the next run compares them with its budget.
    return kind not in _PASSING or code == "in_doubt"


def _kind(status: str | None, error_kind: str | None) -> OutcomeKind:
    if status == "ok":
        return "ok"
    if error_kind == "rejected" or error_kind in _PASSING:
        return cast("OutcomeKind", error_kind)
    return "transient"  # the set is open: what we do not know is tried again


class _BackResponse(Struct):
    status_code: int | None = None
    request_id: str | None = None
    body: Raw = Raw(b"null")


class _BackLine(Struct):
    batchrun: JsonMember
    custom_id: str = ""
    response: _BackResponse | None = None
    error: JsonError | None = None


def _read_jsonl(path: Path, api: Api) -> Iterator[Outcome]:
    decode = msgspec.json.Decoder(_BackLine).decode
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                outcome = _outcome_of_line(decode(line), api)
            except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
                raise LocalIOError(
                    f"{path} line {number}: not a line batchrun wrote; its answers cannot be reused"
                ) from exc
            if outcome is not None:
                yield outcome


def _outcome_of_line(line: _BackLine, api: Api) -> Outcome | None:
    member = line.batchrun
    digest = chat.parse_hash(member.request_hash) if member.request_hash else None
    if digest is None:
        return None
    response = line.response or _BackResponse()
    error = line.error or JsonError()
    body = _back_body(bytes(response.body))
    kind = _kind(member.status, member.error_kind)
    at = member.finished_at
    return Outcome(
        hash=digest,
        occurrence=0,
        kind=kind,
        final=_is_final(kind, error.code),
        attempts=max(0, member.attempts),
        in_doubt=max(0, member.in_doubt_attempts),
        http_status=response.status_code,
        code=error.code or "",
        message=error.message or "",
        request_id=response.request_id or "",
        model=member.request_model or "",
        latency_s=member.latency_s,
        ttft_s=member.ttft_s,
        finished_at_ms=0 if at is None else round(at.timestamp() * 1000),
        usage=member.usage or api.parse(body).usage,
        body=body,
        rebuilt=member.rebuilt,
    )


def _back_body(spliced: bytes) -> bytes:
    if spliced == b"null":
        return b""
    if spliced.startswith(b'"'):
        return msgspec.json.decode(spliced, type=str).encode()
    return spliced

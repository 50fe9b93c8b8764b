"""Publish the table: answer columns to Parquet or JSONL, whole or not at all; and read it back.

A published file is the memory of the runs after it: ``read_back`` gives every outcome it holds as
the journal would have, so that any rerun takes one path. What is said about the whole file, the
Footer, lives in the Parquet file's own key-value metadata and in the last line of a JSONL file.
It is not in the Arrow schema's metadata: that is copied along by whoever filters the table and
writes it anew, and such a file is not batchrun's to replace.

Publishing runs in a thread beside an event loop, so nothing here holds the GIL for long: columns
are made from pieces of at most 4 MB, and Parquet's encoder works without it.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Raw, Struct

from batchrun import answers, prompts
from batchrun.accounting import INVALID_INPUT, OutputTally
from batchrun.config import OutputFormat
from batchrun.errors import LocalIOError
from batchrun.files import Seen, create, make_durable, open_regular, put, seen, sync_directory
from batchrun.types import (
    NO_USAGE,
    Answer,
    Answers,
    ErrorCount,
    Outcome,
    OutcomeKind,
    TokenCounts,
    Tokens,
    Usage,
)

FOOTER_KEY = b"batchrun"
Schema = pa.Schema  # for those who pass one on without a need for pyarrow
GROUP_ROWS = 20_000
# A group is in memory thrice while it is written: as arrays, as pages, and compressed.
GROUP_BYTES = 12_000_000
PIECE_ROWS = 1_024
PIECE_BYTES = 4_000_000
MAX_FOOTER_ERRORS = 50
TEMPORARY_SUFFIX = ".batchrun-tmp"
BACKUP_SUFFIX = ".bak"

_TYPES: Final[Mapping[str, pa.DataType]] = {
    **dict.fromkeys(answers.ANSWER_COLUMNS, pa.string()),
    **dict.fromkeys(
        ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens"),
        pa.int64(),
    ),
    **dict.fromkeys(("http_status", "attempts", "in_doubt_attempts"), pa.int32()),
    **dict.fromkeys(("latency_s", "ttft_s"), pa.float64()),
    "finished_at": pa.timestamp("ms", tz="UTC"),
}
# Nearly every value of these differs: a dictionary would be built, found useless and dropped.
_DISTINCT = frozenset(
    {"custom_id", "response", "reasoning", "tool_calls", "error_message", "latency_s", "ttft_s"}
    | {"request_id", "finished_at", "request_hash", "response_body"}
)
_CELL_TYPES: Final = [_TYPES[name] for name in answers.ANSWER_COLUMNS[:-1]]
_PASSING: Final[frozenset[str]] = frozenset(
    {"rate_limit", "transient", "timeout", "invalid_response"}
)
_NO_ANSWER = Answer()
# Stands for a row that never became a request, and alone has no hash: but for its code, every
# column it fills is null or zero.
_NOT_SENT = Outcome(
    hash=b"",
    occurrence=0,
    kind="rejected",
    final=True,
    attempts=0,
    in_doubt=0,
    http_status=None,
    code="",
    message="",
    request_id="",
    model="",
    latency_s=None,
    ttft_s=None,
    finished_at_ms=0,
    usage=NO_USAGE,
    body=b"",
)


class InvalidRow(Struct, frozen=True, gc=False):
    """A row that could not become a request; ``reason`` says why, without file and line."""

    code: str
    reason: str


class Slice(NamedTuple):
    """Consecutive rows, at most about a thousand: what the input says and what the endpoint said.

    ``carried`` has one row for each outcome and the schema given to ``publish``. ``sources`` are
    looked at for failed rows only, so they may be made lazily. An outcome None is a row still
    pending: it is counted and left out.
    """

    carried: pa.RecordBatch | None
    custom_ids: Sequence[str]
    sources: Sequence[str]  # "prompts.jsonl:214"
    outcomes: Sequence[Outcome | InvalidRow | None]


class FooterRows(Struct, frozen=True):
    """How many rows of the file are what; ``passing`` of the errors are tried by every rerun."""

    ok: int = 0
    error: int = 0
    passing: int = 0
    truncated: int = 0
    filtered: int = 0
    empty: int = 0
    duplicate: int = 0


class Aside(Struct, frozen=True):
    """What marks a file of answers whose rows are gone: the output they left, and since when."""

    output: str
    oldest_ms: int


class Footer(Struct, frozen=True, kw_only=True):
    """What a published file says about itself. Members may be added, never renamed.

    The caller fills in all but ``rows``, ``tokens``, ``errors`` and ``request_models``: ``publish``
    takes those from its tally. An empty file stands for ``Footer(complete=False)``.
    """

    schema: int = 1
    batchrun_version: str = ""
    run_id: str = ""
    publication: str = ""  # of this very file: one run may publish more than once
    complete: bool = True
    synthetic: bool = False
    inputs: list[str] = []
    inputs_digest: str = ""
    settings: dict[str, Any] = {}
    publishing: dict[str, Any] = {}
    hosts: list[str] = []
    started_at: str = ""
    finished_at: str = ""
    rows: FooterRows = FooterRows()
    tokens: TokenCounts = msgspec.field(default_factory=TokenCounts)
    errors: list[ErrorCount] = []
    request_models: list[str] = []
    aside: Aside | None = None


class _Row(NamedTuple):
    custom_id: str
    outcome: Outcome  # like _NOT_SENT: invalid input
    answer: Answer
    message: str  # of the error, "" when there is none


class _Rows(NamedTuple):
    """The rows of a piece, by column: one tuple a row would be most of what publishing costs."""

    custom_ids: Sequence[str]
    outcomes: Sequence[Outcome]
    tokens: Tokens
    answers: Answers
    messages: Sequence[str]

    def one_by_one(self) -> Iterator[_Row]:
        columns = zip(*self.answers, strict=True)
        said = (Answer(a, b, c, NO_USAGE, d, e, f) for a, b, c, d, e, f in columns)
        return map(_Row, self.custom_ids, self.outcomes, said, self.messages)


class _Writer(Protocol):
    def write(self, rows: _Rows, carried: pa.RecordBatch | None) -> None: ...

    def finish(self, footer: Footer) -> None: ...


class Target(NamedTuple):
    """Where to publish, and what was there when it was looked at."""

    shown: Path
    path: Path  # without links
    found: Seen | None
    mode: int | None  # of the file that was there

    @classmethod
    def at(cls, shown: Path) -> Target:
        with _mapped(str(shown)):
            path = Path(os.path.realpath(shown))
            found = seen(path)
            old = _regular_or_none(path)
            return cls(shown, path, found, None if old is None else stat.S_IMODE(old.st_mode))


def publish(
    target: Path | Target | BinaryIO,
    fmt: OutputFormat,
    carried_schema: pa.Schema,
    slices: Iterable[Slice],
    footer: Footer,
    tally: OutputTally,
    *,
    response_body: bool,
) -> Footer:
    """Write every slice, in order, and return the footer with the counts filled in.

    A path changes in one step, when all is written and durable: a reader sees the old file or the
    new one. What is there by then and was not when the Target was made, or a Path given, is never
    replaced. On any failure the old file stays and the temporary is removed. What cannot be
    written is a LocalIOError naming the path; what ``slices`` raises passes as it is. A stream is
    written as the rows come and flushed at the end; a BrokenPipeError of it passes as it is.
    """
    if isinstance(target, Path):
        target = Target.at(target)
    if not isinstance(target, Target):
        sink = _Sink(target, "standard output")
        return _write(sink, fmt, carried_schema, slices, footer, tally, response_body)
    with _replacing(target) as sink:
        return _write(sink, fmt, carried_schema, slices, footer, tally, response_body)


def recognise(path: Path) -> Footer | None:
    """The footer of a file batchrun wrote; None for any other. LocalIOError when unreadable."""
    with _reading(path), open(open_regular(path.resolve(), os.O_RDONLY), "rb") as file:
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


def read_back(path: Path) -> Iterator[Outcome]:
    """Yield what a published file holds, in order, as a journal would hold it.

    Left out are rows of invalid input and rows whose ``request_hash`` has another version.
    ``occurrence`` is 0 throughout: numbering equal hashes is the caller's. An answer published
    without ``response_body`` comes with a body put together from its columns, ``rebuilt`` set.
    """
    with _reading(path):
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        yield from _read_parquet(path) if is_parquet else _read_jsonl(path)


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
    hashes = [prompts.format_hash(outcome.hash) for outcome in outcomes]
    carried = pa.RecordBatch.from_arrays([since], schema=ASIDE_SCHEMA)
    return Slice(carried, hashes, hashes, outcomes)


def read_marks(path: Path) -> Iterator[list[Mark]]:
    """The marks of the rows that ``read_back`` gives of a file set aside, in the same order."""
    with _reading(path), _parquet(path) as file:
        for batch in file.iter_batches(GROUP_ROWS, columns=_MARK_COLUMNS, use_threads=False):
            hashes, ended, ids, since = (_back_values(batch[name], name) for name in _MARK_COLUMNS)
            digests = [prompts.parse_hash(text or "") for text in hashes]
            yield [
                Mark(digest, at or 0, identity or "", left or 0)
                for digest, at, identity, left in zip(digests, ended, ids, since, strict=True)
                if digest is not None
            ]


def read_wanted(path: Path, is_wanted: Callable[[bytes], bool]) -> Iterator[list[Outcome]]:
    """What ``read_back`` gives of a Parquet file, only of wanted hashes; a row group at a time."""
    with _reading(path), _parquet(path) as file:
        for group in range(file.num_row_groups):
            hashes = file.read_row_group(group, columns=["request_hash"], use_threads=False)
            texts = hashes.column(0).to_pylist()
            digests = map(prompts.parse_hash, filter(None, texts))
            wanted = {digest for digest in digests if digest is not None and is_wanted(digest)}
            if wanted:
                found = _outcomes_of(file, [group])
                yield [outcome for outcome in found if outcome.hash in wanted]


class PublishedRow(NamedTuple):
    """One row of a published JSONL file, to be published again."""

    custom_id: str
    source: str
    outcome: Outcome | InvalidRow
    carried: dict[str, Any]


def slices_of(path: Path) -> tuple[pa.Schema, Iterator[Slice]]:
    """A published Parquet file as what ``publish`` takes, to write it in another format."""
    with _reading(path), path.open("rb") as raw:
        schema = pq.read_schema(raw)
    own = set(answers.ANSWER_COLUMNS)
    fields = [field for field in schema if field.name not in own]
    carried = pa.schema(fields, metadata=schema.metadata)
    return carried, _slices_of(path, carried)


def published_rows(path: Path) -> Iterator[PublishedRow]:
    """The rows of a published JSONL file, in order."""
    decode = msgspec.json.Decoder(_BackLine).decode
    with _reading(path), path.open("rb") as file:
        for number, text in enumerate(file, 1):
            line = decode(text)
            message = line.error.message if line.error else None
            code = line.error.code if line.error else None
            outcome = _outcome_of_line(line) or _invalid(code, message)
            carried = line.batchrun.input or {}
            source = _source(outcome, message, f"{path}:{number}")
            yield PublishedRow(line.custom_id, source, outcome, carried)


def backup(path: Path) -> Path:
    """Keep ``path`` also as ``<path>.bak``, or ``.bak.2`` and so on: no file of that name goes.

    ``path`` stays there. A file that is kept already, by a run that was killed, is not kept twice.
    """
    with _mapped(f"{path}{BACKUP_SUFFIX}"):
        for kept in _backup_names(path):
            if _keep_as(path, kept):
                sync_directory(kept.parent)
                return kept
    raise AssertionError("there is no last name")


def _backup_names(path: Path) -> Iterator[Path]:
    first = path.with_name(path.name + BACKUP_SUFFIX)
    yield first
    for number in count(2):
        yield first.with_name(f"{first.name}.{number}")


def _keep_as(path: Path, kept: Path) -> bool:
    """Whether ``kept`` is now, or was, the same file as ``path``."""
    if os.path.lexists(kept):
        is_file = stat.S_ISREG(kept.lstat().st_mode)
        return is_file and filecmp.cmp(path, kept, shallow=False)
    try:
        os.link(os.path.realpath(path), kept)
    except FileExistsError:
        return False
    except OSError:
        _copy(path, kept)
    return True


def _copy(path: Path, kept: Path) -> None:
    """For file systems without links: whole or not at all, though not proof against a race."""
    temporary = _temporary(path)
    try:
        shutil.copy2(path, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(kept)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clean_leftovers(path: Path) -> None:
    """Remove temporaries that killed publishes of ``path`` left; call it holding the lock."""
    path = Path(os.path.realpath(path))
    pattern = re.compile(
        re.escape(_temporary_prefix(path)) + r"(\d+)" + re.escape(TEMPORARY_SUFFIX)
    )
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            match = pattern.fullmatch(entry.name)
            if match and not _runs_elsewhere(int(match[1])):
                os.unlink(entry.path)


# --- rows ----------------------------------------------------------------------------------------


def _write(
    sink: _Sink,
    fmt: OutputFormat,
    carried_schema: pa.Schema,
    slices: Iterable[Slice],
    footer: Footer,
    tally: OutputTally,
    response_body: bool,
) -> Footer:
    writer: _Writer
    if fmt == "parquet":
        writer = _ParquetWriter(sink, carried_schema, response_body)
    else:
        writer = _JsonlWriter(sink, response_body)
    try:
        for whole in slices:
            for piece in _pieces(whole):
                rows, carried = _told(piece, tally)
                if rows.outcomes:
                    writer.write(rows, carried)
        footer = _filled_in(footer, tally)
        writer.finish(footer)
    except BaseException:
        # pyarrow writes a footer when its writer is collected; by then nobody wants it.
        sink.discard()
        raise
    sink.flush()
    return footer


def _filled_in(footer: Footer, tally: OutputTally) -> Footer:
    rows = tally.rows
    return msgspec.structs.replace(
        footer,
        rows=FooterRows(
            ok=rows.ok,
            error=rows.error,
            passing=tally.passing,
            truncated=rows.truncated,
            filtered=rows.filtered,
            empty=rows.empty,
            duplicate=rows.duplicate,
        ),
        tokens=tally.tokens,
        errors=tally.errors[:MAX_FOOTER_ERRORS],
        request_models=tally.request_models,
    )


def _footer_json(footer: Footer) -> bytes:
    try:
        return msgspec.json.encode(footer)
    except UnicodeEncodeError:  # a file name need not be UTF-8
        return _clean(json.dumps(msgspec.to_builtins(footer), ensure_ascii=False)).encode()


def _pieces(whole: Slice) -> Iterator[Slice]:
    """Cut a slice so that no piece is much larger than PIECE_BYTES or longer than PIECE_ROWS."""
    ends = _ends(whole)
    if len(ends) <= 1:
        yield whole
        return
    start = 0
    for end in ends:
        yield Slice(
            None if whole.carried is None else whole.carried.slice(start, end - start),
            whole.custom_ids[start:end],
            [whole.sources[at] for at in range(start, end)],
            whole.outcomes[start:end],
        )
        start = end


def _ends(whole: Slice) -> list[int]:
    outcomes, carried = whole.outcomes, whole.carried
    each = 0 if carried is None or not len(outcomes) else carried.nbytes // len(outcomes)
    sizes = [len(o.body) + each if type(o) is Outcome else each for o in outcomes]
    if len(sizes) <= PIECE_ROWS and sum(sizes) < PIECE_BYTES:
        return [len(outcomes)]
    ends: list[int] = []
    start = size = 0
    for end, more in enumerate(sizes, 1):
        size += more
        if size >= PIECE_BYTES or end - start >= PIECE_ROWS or end == len(sizes):
            ends.append(end)
            start, size = end, 0
    return ends


def _told(piece: Slice, tally: OutputTally) -> tuple[_Rows, pa.RecordBatch | None]:
    """Tell the tally about every row; return those that are published, with what they carry."""
    kept = [at for at, outcome in enumerate(piece.outcomes) if outcome is not None]
    custom_ids, carried = piece.custom_ids, piece.carried
    for _ in range(len(piece.outcomes) - len(kept)):
        tally.add(None, None, None, "", "")
    if len(kept) < len(piece.outcomes):
        custom_ids = [custom_ids[at] for at in kept]
        # Typed, for a piece without any answer: an empty list alone would be of type null.
        carried = None if carried is None else carried.take(pa.array(kept, pa.int64()))
    found = [piece.outcomes[at] for at in kept]
    ok = [at for at, each in enumerate(found) if type(each) is Outcome and each.kind == "ok"]
    messages = [""] * len(found)
    if len(ok) < len(found):
        tally.note_models([each.model for each in found if type(each) is Outcome])
        custom_ids = list(custom_ids)
        for at in sorted(set(range(len(found))) - set(ok)):
            failed = cast("Outcome | InvalidRow", found[at])
            row = _failed(custom_ids[at], failed, piece.sources[kept[at]], tally)
            custom_ids[at], found[at], messages[at] = row.custom_id, row.outcome, row.message
    rows = _rows(custom_ids, cast("list[Outcome]", found), messages)
    _tell_ok(rows, ok, tally)
    return rows, carried


def _rows(custom_ids: Sequence[str], outcomes: Sequence[Outcome], messages: Sequence[str]) -> _Rows:
    usages = [outcome.usage for outcome in outcomes]
    tokens = Tokens(
        [usage.prompt_tokens for usage in usages],
        [usage.completion_tokens for usage in usages],
        [usage.total_tokens for usage in usages],
        [usage.cached_tokens for usage in usages],
        [usage.reasoning_tokens for usage in usages],
    )
    bodies = [o.body if o.kind == "ok" else answers.NOTHING for o in outcomes]
    return _Rows(custom_ids, outcomes, tokens, answers.columns(bodies), messages)


def _tell_ok(rows: _Rows, ok: list[int], tally: OutputTally) -> None:
    outcomes, tokens, said = rows.outcomes, rows.tokens, rows.answers
    if len(ok) < len(outcomes):
        outcomes = [outcomes[at] for at in ok]
        tokens = Tokens(*([column[at] for at in ok] for column in tokens))
        # One type a column, which a loop over them cannot say.
        said = Answers(*cast("Any", ([column[at] for at in ok] for column in said)))
    models, occurrences = [o.model for o in outcomes], [o.occurrence for o in outcomes]
    tally.add_ok(models, occurrences, tokens, said)


def _failed(custom_id: str, outcome: Outcome | InvalidRow, source: str, tally: OutputTally) -> _Row:
    source = _clean(source)
    if isinstance(outcome, Outcome):
        row = _clean_row(_Row(custom_id, outcome, _NO_ANSWER, outcome.message))
        tally.add(row.outcome, None, None, row.custom_id, source)
        return row
    reason = _clean(outcome.reason)
    not_sent = msgspec.structs.replace(_NOT_SENT, code=outcome.code)
    row = _Row(_clean(custom_id), not_sent, _NO_ANSWER, f"{source}: {reason}")
    tally.add(None, reason, None, row.custom_id, source, invalid_code=outcome.code)
    return row


def _clean_row(row: _Row) -> _Row:
    """The row with texts that UTF-8 can hold; a journal or a header may have brought others."""
    custom_id, outcome, answer, message = row
    outcome = msgspec.structs.replace(
        outcome,
        code=_clean(outcome.code),
        message=_clean(outcome.message),
        request_id=_clean(outcome.request_id),
        model=_clean(outcome.model),
    )
    return _Row(_clean(custom_id), outcome, answer, _clean(message))


def _clean(text: str) -> str:
    """``text``, each lone surrogate in it replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- Parquet -------------------------------------------------------------------------------------


class _ParquetWriter:
    """Collects pieces into row groups and writes each group in one call, without the GIL."""

    def __init__(self, sink: _Sink, carried: pa.Schema, response_body: bool) -> None:
        names = answers.ANSWER_COLUMNS if response_body else answers.ANSWER_COLUMNS[:-1]
        own = [pa.field(name, _TYPES[name]) for name in names]
        metadata = {k: v for k, v in (carried.metadata or {}).items() if k != FOOTER_KEY}
        self._schema = pa.schema([*carried, *own], metadata=metadata or None)
        self._response_body = response_body
        self._writer = pq.ParquetWriter(
            sink,
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in self._schema.names if name not in _DISTINCT],
        )
        self._group: list[pa.RecordBatch] = []
        self._group_rows = self._group_bytes = 0

    def write(self, rows: _Rows, carried: pa.RecordBatch | None) -> None:
        arrays = list(carried.columns) if carried is not None else []
        arrays += map(_array, _columns(rows), _CELL_TYPES)
        if self._response_body:
            arrays.append(_bodies(rows.outcomes))
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        size = batch.nbytes
        count = len(rows.outcomes)
        if self._group_rows + count > GROUP_ROWS or self._group_bytes + size > GROUP_BYTES:
            self._close_group()
        self._group.append(batch)
        self._group_rows += count
        self._group_bytes += size

    def finish(self, footer: Footer) -> None:
        self._close_group()
        self._writer.add_key_value_metadata({FOOTER_KEY: _footer_json(footer)})
        self._writer.close()

    def _close_group(self) -> None:
        if self._group:
            table = pa.Table.from_batches(self._group, self._schema)
            self._group = []
            self._group_rows = self._group_bytes = 0
            self._writer.write_table(table, row_group_size=GROUP_ROWS)


def _columns(rows: _Rows) -> list[Sequence[object]]:
    """The values in the order of ANSWER_COLUMNS, but for the last: the body."""
    outcomes, tokens, said = rows.outcomes, rows.tokens, rows.answers
    return [
        rows.custom_ids,
        ["ok" if o.kind == "ok" else "error" for o in outcomes],
        said.responses,
        said.finish_reasons,
        [o.model or None for o in outcomes],
        said.response_models,
        *tokens,
        said.reasonings,
        said.tool_calls,
        *_error_columns(rows),
        [o.http_status for o in outcomes],
        [o.attempts for o in outcomes],
        [o.in_doubt for o in outcomes],
        [o.latency_s for o in outcomes],
        [o.ttft_s for o in outcomes],
        [o.request_id or None for o in outcomes],
        [o.finished_at_ms or None for o in outcomes],
        prompts.format_hashes([o.hash for o in outcomes]),
    ]


def _error_columns(rows: _Rows) -> Iterable[Sequence[object]]:
    """Kind, code and message; null where a row is ok."""
    failed = [None if o.kind == "ok" else o for o in rows.outcomes]
    if failed.count(None) == len(failed):
        return failed, failed, failed
    return (
        [o and (o.kind if o.hash else INVALID_INPUT) for o in failed],
        [o and (o.code or None) for o in failed],
        [o and (text or None) for o, text in zip(failed, rows.messages, strict=True)],
    )


def _array(values: Sequence[object], kind: pa.DataType) -> pa.Array:
    first = values[0]
    try:
        if values.count(first) == len(values):  # most columns are of one value, or of none
            return pa.repeat(pa.scalar(first, kind), len(values))
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([_clean(v) if isinstance(v, str) else v for v in values], kind)


def _bodies(outcomes: Sequence[Outcome]) -> pa.Array:
    """The column response_body; a body put together from columns is not the endpoint's."""
    bodies = [o.body if o.body and not o.rebuilt else None for o in outcomes]
    try:
        return pa.array(bodies, pa.string())  # checks the UTF-8 and copies, no text in between
    except pa.ArrowInvalid:
        texts = [None if body is None else answers.body_text(body) for body in bodies]
        return pa.array(texts, pa.string())


# --- JSONL ---------------------------------------------------------------------------------------


class _JsonResponse(Struct):
    status_code: int | None = None
    request_id: str | None = None
    body: Raw | str | None = None


class _JsonError(Struct):
    code: str | None = None
    message: str | None = None


class _JsonMember(Struct, omit_defaults=True):
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
    error: _JsonError | None
    batchrun: _JsonMember  # the last member, for the last line's sake


class _JsonlWriter:
    """OpenAI batch output lines. The last one waits: the footer becomes its ``batchrun.run``."""

    def __init__(self, sink: _Sink, response_body: bool) -> None:
        self._sink = sink
        self._response_body = response_body
        self._encode = msgspec.json.Encoder(enc_hook=str).encode
        self._written = 0
        self._last = b""

    def write(self, rows: _Rows, carried: pa.RecordBatch | None) -> None:
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
            run = b',"run":' + _footer_json(footer)
            self._sink.write(self._last[:-2] + run + b"}}\n")

    def _line(self, row: _Row, carried: dict[str, object] | None) -> bytes:
        line = self._made(row, carried)
        try:
            return self._encode(line)
        except UnicodeEncodeError:
            return self._encode(self._made(_clean_row(row), carried))

    def _made(self, row: _Row, carried: dict[str, object] | None) -> _JsonLine:
        identity = f"batch_req_{self._written}"
        outcome = row.outcome
        if not outcome.hash:
            member = _JsonMember(
                "error",
                error_kind=INVALID_INPUT,
                attempts=0,
                in_doubt_attempts=0,
                input=carried,
            )
            error = _JsonError(outcome.code or None, row.message)
            return _JsonLine(identity, row.custom_id, None, error, member)
        is_ok = outcome.kind == "ok"
        rebuilt = is_ok and (outcome.rebuilt or not self._response_body)
        body = self._body(row, outcome, rebuilt)
        member = _JsonMember(
            "ok" if is_ok else "error",
            prompts.format_hash(outcome.hash),
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
        failure = None if is_ok else _JsonError(outcome.code or None, row.message or None)
        response = _JsonResponse(outcome.http_status, outcome.request_id or None, body)
        said = outcome.http_status is not None or body is not None
        return _JsonLine(identity, row.custom_id, response if said else None, failure, member)

    def _body(self, row: _Row, outcome: Outcome, rebuilt: bool) -> Raw | str | None:
        if rebuilt:
            return Raw(_rebuilt(row.answer, outcome.usage))
        if not outcome.body or not self._response_body:
            return None
        spliced = answers.body_json(outcome.body)
        # A body that is no object or array, an HTML page for instance, is the text of it.
        return answers.body_text(outcome.body) if spliced is None else Raw(spliced)


def _rebuilt(answer: Answer, usage: Usage) -> bytes:
    return answers.rebuild(
        answer.response,
        answer.finish_reason,
        answer.response_model,
        usage,
        answer.reasoning,
        answer.tool_calls,
    )


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


# --- reading back --------------------------------------------------------------------------------

_BACK_COLUMNS = tuple(name for name in answers.ANSWER_COLUMNS if name != "custom_id")


def _parquet_footer(path: Path) -> Footer | None:
    try:
        with path.open("rb") as raw:
            metadata = pq.read_metadata(raw).metadata or {}
    except pa.ArrowException:
        return None
    return _footer(metadata.get(FOOTER_KEY, b""))


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
    return None if line.batchrun is None else _footer(bytes(line.batchrun.run))


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


def _footer(text: bytes) -> Footer | None:
    try:
        return msgspec.json.decode(text, type=Footer)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    with (
        path.open("rb") as raw,
        pq.ParquetFile(raw, pre_buffer=False, buffer_size=256_000) as file,
    ):
        yield file


def _read_parquet(path: Path) -> Iterator[Outcome]:
    with _parquet(path) as file:
        yield from _outcomes_of(file, None)


def _outcomes_of(file: pq.ParquetFile, groups: list[int] | None) -> Iterator[Outcome]:
    present = [name for name in _BACK_COLUMNS if name in file.schema_arrow.names]
    for batch in file.iter_batches(
        PIECE_ROWS, row_groups=groups, columns=present, use_threads=False
    ):
        columns = {name: _back_values(batch.column(name), name) for name in present}
        absent = [None] * batch.num_rows
        rows = zip(*[columns.get(name, absent) for name in _BACK_COLUMNS], strict=True)
        for row in rows:
            outcome = _outcome_of(_Published(*row))
            if outcome is not None:
                yield outcome


def _slices_of(path: Path, carried: pa.Schema) -> Iterator[Slice]:
    done = 0
    with (
        _reading(path),
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
                outcome = _outcome_of(published) or _invalid(published.error_code, message)
                outcomes.append(outcome)
                places.append(_source(outcome, message, f"{path}:{done}"))
            custom_ids = batch.column("custom_id").to_pylist()
            yield Slice(batch.select(carried.names), custom_ids, places, outcomes)


# An invalid row is published as "file:line: reason"; published again it must say that once.
_PLACED: Final = re.compile(r"(.+?:\d+): (.*)", re.DOTALL)


def _invalid(code: str | None, message: str | None) -> InvalidRow:
    match = _PLACED.fullmatch(message or "")
    return InvalidRow(code or "", match[2] if match else message or "")


def _source(outcome: Outcome | InvalidRow, message: str | None, otherwise: str) -> str:
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


def _outcome_of(row: _Published) -> Outcome | None:
    digest = prompts.parse_hash(row.request_hash) if row.request_hash else None
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
        body = answers.rebuild(
            row.response,
            row.finish_reason,
            row.response_model,
            usage,
            row.reasoning,
            row.tool_calls,
        )
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
    batchrun: _JsonMember
    custom_id: str = ""
    response: _BackResponse | None = None
    error: _JsonError | None = None


def _read_jsonl(path: Path) -> Iterator[Outcome]:
    decode = msgspec.json.Decoder(_BackLine).decode
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                outcome = _outcome_of_line(decode(line))
            except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
                raise LocalIOError(
                    f"{path} line {number}: not a line batchrun wrote; its answers cannot be reused"
                ) from exc
            if outcome is not None:
                yield outcome


def _outcome_of_line(line: _BackLine) -> Outcome | None:
    member = line.batchrun
    digest = prompts.parse_hash(member.request_hash) if member.request_hash else None
    if digest is None:
        return None
    response = line.response or _BackResponse()
    error = line.error or _JsonError()
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
        usage=member.usage or answers.parse(body).usage,
        body=body,
        rebuilt=member.rebuilt,
    )


def _back_body(spliced: bytes) -> bytes:
    if spliced == b"null":
        return b""
    if spliced.startswith(b'"'):
        return msgspec.json.decode(spliced, type=str).encode()
    return spliced


# --- files ---------------------------------------------------------------------------------------


class _Sink:
    """A file to write to whose failures are LocalIOErrors naming it, from wherever they come.

    pyarrow hands on what a Python file raises, so its writes pass here as well as ours.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._discarding = False
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        if not self._discarding:
            with _mapped(self._name):
                self._file.write(data)
        return len(data)

    def flush(self) -> None:
        if not self._discarding:
            with _mapped(self._name):
                self._file.flush()

    def discard(self) -> None:
        """Let every later write go nowhere."""
        self._discarding = True

    def close(self) -> None:
        """Closing is for whoever opened the file."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


@contextmanager
def _replacing(target: Target) -> Iterator[_Sink]:
    """A new file that takes the target's place when the block ends well, and else never existed."""
    shown = str(target.shown)
    with _mapped(shown):
        temporary = _temporary(target.path)
        file = _create(temporary, target.mode)
    try:
        # What the block raises is not of this file's making and passes as it is.
        yield _Sink(file, shown)
        with _mapped(shown):
            file.flush()
            make_durable(file.fileno())
            file.close()
            try:
                put(temporary, target.path, target.found)
            except FileExistsError as exc:
                raise _changed(shown) from exc
            sync_directory(target.path.parent)
    except BaseException:
        with suppress(OSError):  # closing writes what is buffered, and fails as the write before
            file.close()
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _changed(shown: str) -> LocalIOError:
    return LocalIOError(
        f"{shown}: was written by somebody else in the meantime, and was left as it is",
        next_steps=("run the same command again: no answer is lost",),
    )


def _regular_or_none(path: Path) -> os.stat_result | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return found


def _create(temporary: Path, mode: int | None) -> BinaryIO:
    descriptor = create(temporary, 0o666)
    if mode is not None:
        os.fchmod(descriptor, mode)
    return os.fdopen(descriptor, "wb")


def _temporary_prefix(path: Path) -> str:
    # A file name may have 255 bytes; the prefix leaves room for the number and the suffix.
    return "." + os.fsdecode(os.fsencode(path.name)[:220]) + "."


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_temporary_prefix(path)}{os.getpid()}{TEMPORARY_SUFFIX}")


def _runs_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _mapped(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "disk full" if full else exc.strerror or str(exc)
        raise LocalIOError(f"{name}: cannot be written: {why}") from exc


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as exc:
        why = getattr(exc, "strerror", None) or str(exc).splitlines()[0]
        raise LocalIOError(f"{path}: cannot be read: {why}") from exc

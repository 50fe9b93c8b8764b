"""The answer columns, each said once: its type, what fills it, where reading back puts it.

Both writers, both readers and the rule by which an input column gives way go by this table; the
manual's table says the same to people, and a test compares the two. A column of what an Outcome
holds already is one more line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple, cast

import pyarrow as pa
from msgspec.structs import replace

from batchrun import chat
from batchrun.outputs.rows import InvalidRow, Rows
from batchrun.outputs.tally import INVALID_INPUT
from batchrun.types import Outcome, OutcomeKind, Usage

TEXT: Final = pa.string()
COUNT: Final = pa.int64()
SMALL: Final = pa.int32()
SECONDS: Final = pa.float64()
DOLLARS: Final = pa.float64()
INSTANT: Final = pa.timestamp("ms", tz="UTC")  # as Unix milliseconds, in and out


class Column(NamedTuple):
    """One answer column.

    ``values`` are those of a whole piece: one call a column, not one a row, is most of the speed
    of publishing.
    """

    name: str
    type: pa.DataType
    values: Callable[[Rows], Sequence[object] | pa.Array]
    repeats: bool = True  # where nearly every value differs, a dictionary is built and dropped
    field: str = ""  # of Outcome: takes the value as it is read back
    null: object = None  # what a null is in that field
    extra: bool = False  # OpenAI's batch lines have no place for it: a member of ``batchrun``


def _each(field: str, null: object = None) -> Callable[[Rows], Sequence[object]]:
    """One field of every outcome, a null where it is ``null``."""
    get = attrgetter(field)

    def values(rows: Rows) -> Sequence[object]:
        found = list(map(get, rows.outcomes))
        return found if null is None else [each or None for each in found]

    return values


def _statuses(rows: Rows) -> Sequence[object]:
    return ["ok" if o is None else "error" for o in rows.failed]


def _kinds(rows: Rows) -> Sequence[object]:
    return [o and (o.kind if o.hash else INVALID_INPUT) for o in rows.failed]


def _codes(rows: Rows) -> Sequence[object]:
    return [o and (o.code or None) for o in rows.failed]


def _messages(rows: Rows) -> Sequence[object]:
    return [o and (o.message or None) for o in rows.failed]


def _hashes(rows: Rows) -> Sequence[object]:
    return chat.format_hashes([o.hash for o in rows.outcomes])


def _bodies(rows: Rows) -> pa.Array:
    """What the endpoint sent; a body put together from columns is not the endpoint's."""
    bodies = [o.body if o.body and not o.rebuilt else None for o in rows.outcomes]
    try:
        return pa.array(bodies, TEXT)  # checks the UTF-8 and copies, no text in between
    except pa.ArrowInvalid:
        return pa.array([None if body is None else chat.body_text(body) for body in bodies], TEXT)


COLUMNS: Final = (
    Column("custom_id", TEXT, lambda rows: rows.custom_ids, repeats=False),
    Column("status", TEXT, _statuses, extra=True),
    Column("response", TEXT, lambda rows: rows.answers.responses, repeats=False),
    Column("finish_reason", TEXT, lambda rows: rows.answers.finish_reasons),
    Column("request_model", TEXT, _each("model", ""), field="model", null="", extra=True),
    Column("response_model", TEXT, lambda rows: rows.answers.response_models),
    Column("prompt_tokens", COUNT, lambda rows: rows.tokens.prompt),
    Column("completion_tokens", COUNT, lambda rows: rows.tokens.completion),
    Column("total_tokens", COUNT, lambda rows: rows.tokens.total),
    Column("cached_tokens", COUNT, lambda rows: rows.tokens.cached),
    Column("reasoning_tokens", COUNT, lambda rows: rows.tokens.reasoning),
    Column("cost_usd", DOLLARS, lambda rows: rows.costs, extra=True),
    Column("reasoning", TEXT, lambda rows: rows.answers.reasonings, repeats=False),
    Column("tool_calls", TEXT, lambda rows: rows.answers.tool_calls, repeats=False),
    Column("error_kind", TEXT, _kinds, extra=True),
    Column("error_code", TEXT, _codes, field="code", null=""),
    Column("error_message", TEXT, _messages, repeats=False, field="message", null=""),
    Column("http_status", SMALL, _each("http_status"), field="http_status"),
    Column("attempts", SMALL, _each("attempts"), field="attempts", null=0, extra=True),
    Column("in_doubt_attempts", SMALL, _each("in_doubt"), field="in_doubt", null=0, extra=True),
    Column("latency_s", SECONDS, _each("latency_s"), repeats=False, field="latency_s", extra=True),
    Column("ttft_s", SECONDS, _each("ttft_s"), repeats=False, field="ttft_s", extra=True),
    Column("request_id", TEXT, _each("request_id", ""), repeats=False, field="request_id", null=""),
    Column(
        "finished_at",
        INSTANT,
        _each("finished_at_ms", 0),
        repeats=False,
        field="finished_at_ms",
        null=0,
        extra=True,
    ),
    Column("request_hash", TEXT, _hashes, repeats=False, extra=True),
    Column("response_body", TEXT, _bodies, repeats=False),  # the last one: it may be left out
)
PAID_BY: Final = Column("paid_by", TEXT, lambda rows: rows.paid_by, repeats=False, extra=True)
NAMES: Final = tuple(column.name for column in COLUMNS)
_RESTORED: Final = [(each.name, each.field, each.null) for each in COLUMNS if each.field]
_PASSING: Final[frozenset[str]] = frozenset(
    {"rate_limit", "transient", "timeout", "invalid_response"}
)


def settled(
    table: Mapping[str, Sequence[Any]],
    usages: Sequence[Usage],
    bodies: Sequence[bytes],
    rebuilt: Sequence[bool],
) -> list[Outcome | InvalidRow]:
    """What a journal would hold of published rows, given by column; a column may be missing.

    ``occurrence`` is 0: numbering equal hashes is the caller's. A row without a hash of our
    version is no answer: it comes back as invalid, its message as it was published.
    """
    absent = [None] * len(bodies)
    hashes, status, kinds, codes, messages = (
        table.get(name, absent)
        for name in ("request_hash", "status", "error_kind", "error_code", "error_message")
    )
    fields: dict[str, Sequence[Any]] = {
        "hash": [(text and chat.parse_hash(text)) or b"" for text in hashes],
        "occurrence": [0] * len(bodies),
        "kind": list(map(_kind, status, kinds)),
        "usage": usages,
        "body": bodies,
        "rebuilt": rebuilt,
    }
    # Version 0.1 named a spent doubt budget in the code. Since then the attempts in doubt say it,
    # and whoever plans the next run compares them with its budget.
    fields["final"] = [
        kind not in _PASSING or code == "in_doubt"
        for kind, code in zip(fields["kind"], codes, strict=True)
    ]
    for name, field, null in _RESTORED:
        fields[field] = _filled(table.get(name, absent), null)
    outcomes = map(Outcome, *(fields[field] for field in Outcome.__struct_fields__))
    return [
        outcome if outcome.hash else InvalidRow(code or "", message or "")
        for outcome, code, message in zip(outcomes, codes, messages, strict=True)
    ]


def told_once(
    rows: Sequence[Outcome | InvalidRow], paid_by: Sequence[str | None]
) -> Iterator[Outcome]:
    """What a journal holds of published rows: an answer is told by the row that paid.

    Of a copy it holds what had been asked for the row itself, in vain and perhaps billed.
    """
    for row, payer in zip(rows, paid_by, strict=True):
        if type(row) is not Outcome:
            continue
        if payer is None:
            yield row
        elif row.attempts:
            yield replace(row, kind="transient", final=False, code="", message="", body=b"")


def _filled(values: Sequence[Any], null: object) -> Sequence[Any]:
    if null is None or None not in values:
        return values
    return [null if value is None else value for value in values]


def _kind(status: str | None, error_kind: str | None) -> OutcomeKind:
    if status == "ok":
        return "ok"
    if error_kind in ("rejected", "invalid_answer") or error_kind in _PASSING:
        return cast("OutcomeKind", error_kind)
    return "transient"  # the set is open: what we do not know is tried again

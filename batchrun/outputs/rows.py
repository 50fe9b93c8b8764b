"""Outcomes and carried columns, slice by slice, as the columns of the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import msgspec
import pyarrow as pa
from msgspec import Struct

from batchrun.chat import Api
from batchrun.money import Price
from batchrun.outputs.tally import OutputTally
from batchrun.types import NO_USAGE, Answer, Answers, Outcome, Tokens

GROUP_ROWS = 20_000
PIECE_ROWS = 1_024
PIECE_BYTES = 4_000_000
# Kinds whose body is a completion; that of the other was not what was asked for.
ANSWERED = frozenset(("ok", "invalid_answer"))


# Stands for a row that never became a request, and alone has no hash: but for its code
# and message, every column it fills is null or zero.
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
    pending: it is counted and left out. ``paid_by`` names for each row the one whose answer it
    takes, None where its own; None altogether where no row is a copy. What belongs to the row that
    paid, such as tokens, is then not in the outcome.
    """

    carried: pa.RecordBatch | None
    custom_ids: Sequence[str]
    sources: Sequence[str]  # "prompts.jsonl:214"
    outcomes: Sequence[Outcome | InvalidRow | None]
    paid_by: Sequence[str | None] | None = None


class Rows(NamedTuple):
    """The rows of a piece, by column: one tuple a row would be most of what publishing costs."""

    custom_ids: Sequence[str]
    outcomes: Sequence[Outcome]  # like _NOT_SENT: invalid input
    failed: Sequence[Outcome | None]  # the same, None where the row is ok
    tokens: Tokens
    answers: Answers
    costs: Sequence[float | None]  # US dollars
    paid_by: Sequence[str | None]  # custom_ids

    def answer(self, at: int) -> Answer:
        said = self.answers
        return Answer(
            said.responses[at],
            said.finish_reasons[at],
            said.response_models[at],
            self.outcomes[at].usage,
            said.reasonings[at],
            said.tool_calls[at],
            said.refusals[at],
        )


def pieces(whole: Slice) -> Iterator[Slice]:
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
            None if whole.paid_by is None else whole.paid_by[start:end],
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


def told(piece: Slice, tally: OutputTally, api: Api) -> tuple[Rows, pa.RecordBatch | None]:
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
    paid_by: list[str | None] = [None] * len(found)
    if piece.paid_by is not None:
        paid_by = [piece.paid_by[at] for at in kept]
        for row, payer in zip(found, paid_by, strict=True):
            if payer is not None and type(row) is Outcome:
                tally.note_copy(row.usage)
    ok = [at for at, each in enumerate(found) if type(each) is Outcome and each.kind == "ok"]
    failed: list[Outcome | None] = [None] * len(found)
    if len(ok) < len(found):
        tally.note_models([each.model for each in found if type(each) is Outcome])
        custom_ids = list(custom_ids)
        for at in sorted(set(range(len(found))) - set(ok)):
            custom_ids[at] = clean(custom_ids[at])
            row = cast("Outcome | InvalidRow", found[at])
            source = clean(piece.sources[kept[at]])
            found[at] = failed[at] = _failed(custom_ids[at], row, source, tally)
    rows = _rows(custom_ids, cast("list[Outcome]", found), failed, tally.price, api, paid_by)
    _tell_ok(rows, ok, tally)
    return rows, carried


def _rows(
    custom_ids: Sequence[str],
    outcomes: Sequence[Outcome],
    failed: Sequence[Outcome | None],
    price: Price | None,
    api: Api,
    paid_by: Sequence[str | None],
) -> Rows:
    usages = [outcome.usage for outcome in outcomes]
    tokens = Tokens(
        [usage.prompt_tokens for usage in usages],
        [usage.completion_tokens for usage in usages],
        [usage.total_tokens for usage in usages],
        [usage.cached_tokens for usage in usages],
        [usage.reasoning_tokens for usage in usages],
    )
    bodies = [o.body if o.kind in ANSWERED else api.nothing for o in outcomes]
    costs = [None] * len(usages) if price is None else list(map(price.cost_usd, usages))
    return Rows(custom_ids, outcomes, failed, tokens, api.columns(bodies), costs, paid_by)


def _tell_ok(rows: Rows, ok: list[int], tally: OutputTally) -> None:
    outcomes, tokens, said = rows.outcomes, rows.tokens, rows.answers
    if len(ok) < len(outcomes):
        outcomes = [outcomes[at] for at in ok]
        tokens = Tokens(*([column[at] for at in ok] for column in tokens))
        # One type a column, which a loop over them cannot say.
        said = Answers(*cast("Any", ([column[at] for at in ok] for column in said)))
    models, occurrences = [o.model for o in outcomes], [o.occurrence for o in outcomes]
    tally.add_ok(models, occurrences, tokens, said)


def _failed(custom_id: str, row: Outcome | InvalidRow, source: str, tally: OutputTally) -> Outcome:
    if isinstance(row, Outcome):
        outcome = _clean(row)
        tally.add(outcome, None, None, custom_id, source)
        return outcome
    reason = clean(row.reason)
    tally.add(None, reason, None, custom_id, source, invalid_code=row.code)
    return msgspec.structs.replace(_NOT_SENT, code=row.code, message=f"{source}: {reason}")


def cleaned(rows: Rows) -> Rows:
    """The rows with texts that UTF-8 can hold; a journal or a header may have brought others."""
    return rows._replace(
        custom_ids=list(map(clean, rows.custom_ids)),
        outcomes=list(map(_clean, rows.outcomes)),
        paid_by=[name and clean(name) for name in rows.paid_by],
    )


def _clean(outcome: Outcome) -> Outcome:
    return msgspec.structs.replace(
        outcome,
        code=clean(outcome.code),
        message=clean(outcome.message),
        request_id=clean(outcome.request_id),
        model=clean(outcome.model),
    )


def clean(text: str) -> str:
    """``text``, each lone surrogate in it replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

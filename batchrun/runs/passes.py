"""The input read again after planning: once for what is sent, once for what is published."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from batchrun import chat, inputs
from batchrun.chat import Invalid
from batchrun.config import RunConfig
from batchrun.inputs import BadRow, Batch, Row, Rows
from batchrun.journal import Held, Journal
from batchrun.outputs import InvalidRow, Schema, Slice
from batchrun.runs.copies import NO_EFFORT, Payers, copy_of, efforts
from batchrun.runs.plan import BATCH_ROWS, INVALID, Plan
from batchrun.runs.sources import (
    CheckStop,
    Source,
    batches,
    changed,
    check_unchanged,
    identified,
)
from batchrun.types import NO_USAGE, Outcome, Request

# A batch is large enough that handing it over costs nothing, small enough to flow.
BATCH_BYTES = 4 * 2**20


def to_send(config: RunConfig) -> Collection[Held]:
    """Failures that pass are tried by every rerun, final ones only by --retry-failed."""
    return {Held.NEW, Held.PASSING, *([Held.REJECTED] if config.retry_failed else [])}


def requests(plan: Plan, journal: Journal, config: RunConfig) -> Iterator[list[Request]]:
    """The second pass: the requests of the rows still to be sent, in order, in batches.

    A row that is not what the plan saw ends the run: the input changed while it was read.
    """
    batch: list[Request] = []
    size_bytes = 0
    for request in every(plan, journal, config, to_send(config)):
        batch.append(request)
        size_bytes += len(request.body)
        if len(batch) >= BATCH_ROWS or size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
    check_unchanged(plan.sources)


def every(
    plan: Plan,
    journal: Journal,
    config: RunConfig,
    held: Collection[Held],
    *,
    tried_copies: bool = False,
) -> Iterator[Request]:
    """The requests of the rows with one of these, in order; a copy asks nothing.

    With ``tried_copies`` also what was asked for copies before they became some.
    """
    row_number = 0
    for source, batch in batches(plan.sources, plan.chosen):
        first, row_number = row_number, row_number + len(batch)
        slots = plan.slots[first:row_number]
        places = _places(slots, held, journal)
        if plan.copies is not None:
            places = [at for at in places if not plan.copies.is_copy(first + at)]
            if tried_copies and (tried := plan.copies.tried(first, row_number)):
                for row, slot in tried.items():
                    slots[row - first] = slot
                places = sorted({*places, *(row - first for row in tried)})
        used = journal.used([slots[index] for index in places])
        for index in places:
            slot = slots[index]
            row = first + index
            built = identified(source.builder, batch.rows[index])
            if isinstance(built, Invalid) or built.hash != journal.hash(slot):
                raise changed(source.file)
            in_doubt = journal.in_doubt(slot)
            if journal.held(slot) is Held.REJECTED or in_doubt > config.max_in_doubt_retries:
                # Only --retry-failed comes here: the user's word that the risk is taken anew.
                in_doubt = 0
            yield Request(
                row=row,
                body=chat.encode(built.body),
                hash=built.hash,
                occurrence=journal.occurrence(slot),
                slot=slot,
                model=built.model,
                model_from_row=built.model_from_row,
                in_doubt=in_doubt,
                used=used.get(slot, NO_USAGE),
            )


def _places(slots: Sequence[int], held: Collection[Held], journal: Journal) -> Sequence[int]:
    if INVALID not in slots:
        return journal.places(slots, held)
    valid = [index for index, slot in enumerate(slots) if slot != INVALID]
    return [valid[at] for at in journal.places([slots[index] for index in valid], held)]


def slices(
    plan: Plan,
    journal: Journal,
    config: RunConfig,
    check_stop: CheckStop,
) -> Iterator[Slice]:
    """The third pass: every row with its answer, or None where it has none yet."""

    def identifying(source: Source) -> Collection[str] | None:
        # Why a row is invalid is found out again: reasons for 10,000,000 bad rows are not kept.
        return source.layout.columns_needed if plan.counts.invalid_of[source] else (chat.CUSTOM_ID,)

    payers = Payers()
    row_number = 0
    reading = batches(
        plan.sources, plan.chosen, check_stop, columns=identifying, carried=plan.carried
    )
    for source, batch in reading:
        first, row_number = row_number, row_number + len(batch)
        if row_number > len(plan.slots):
            raise changed(source.file)
        slots = plan.slots[first:row_number]
        samples, before = plan.chosen.samples, plan.chosen.rows_before
        custom_ids = _custom_ids(batch.rows, first + before * samples, samples)
        outcomes = _outcomes(source, batch, slots, journal)
        paid_by = None
        if plan.copies is not None:
            marks = plan.copies.marks(first, row_number)
            paid_by = payers.names(marks, slots, custom_ids)
            if paid_by is not None:
                tried = plan.copies.tried(first, row_number)
                outcomes = _copied(outcomes, paid_by, first, tried, journal)
        places = Places(source.file.name, batch.lines)
        yield Slice(batch.carried, custom_ids, places, outcomes, paid_by)
    check_unchanged(plan.sources)


def _copied(
    outcomes: Sequence[Outcome | InvalidRow | None],
    paid_by: Sequence[str | None],
    first: int,
    tried: Mapping[int, int],
    journal: Journal,
) -> Sequence[Outcome | InvalidRow | None]:
    own = dict(zip(tried, efforts(list(tried.values()), journal), strict=True))
    return [
        each
        if payer is None or type(each) is not Outcome
        else copy_of(each, own.get(row, NO_EFFORT))
        for row, (each, payer) in enumerate(zip(outcomes, paid_by, strict=True), first)
    ]


def _outcomes(
    source: Source, batch: Batch, slots: Sequence[int], journal: Journal
) -> Sequence[Outcome | InvalidRow | None]:
    if INVALID not in slots:
        return journal.read_all(slots)
    held = iter(journal.read_all([slot for slot in slots if slot != INVALID]))
    return [
        _invalid(source, row) if slot == INVALID else next(held)
        for slot, row in zip(slots, batch.rows, strict=True)
    ]


def _invalid(source: Source, row: Row | BadRow) -> InvalidRow:
    built = identified(source.builder, row)
    if not isinstance(built, Invalid):
        raise changed(source.file)
    return InvalidRow(built.code, built.reason)


def schema_of(plan: Plan) -> Schema:
    """What the rows of ``slices`` carry."""
    carried = plan.carried.schema
    return carried if plan.chosen.samples == 1 else inputs.with_sample(carried)


def _custom_ids(rows: Rows, first: int, samples: int) -> list[str]:
    """A row's own id, or else its number, from 1; ``first`` and ``rows`` count repetitions."""
    custom_ids = [str(at // samples + 1) for at in range(first, first + len(rows))]
    for at, row in enumerate(rows):
        if type(row) is dict and chat.CUSTOM_ID in row:
            custom_ids[at] = chat.custom_id(row) or custom_ids[at]
    return custom_ids


class Places(Sequence[str]):
    """Where rows stand, for people: ``prompts.jsonl:214``; made only when asked for."""

    __slots__ = ("_lines", "_name")

    def __init__(self, name: str, lines: Sequence[int]) -> None:
        self._name = name
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # nobody slices it
        return f"{self._name}:{self._lines[index]}"

"""Which rows still need an answer: one pass over the whole input before anything is sent.

The pass builds every row's request, hashes it and claims its place in the journal's index, so that
the start lines tell the truth, the bar has a total, and the later passes (sending, publishing) find
a row's answer without hashing again. Per row it keeps four bytes here and those of the index.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from batchrun import chat, inputs, outputs
from batchrun.chat import CHAT, Api, Builder, Built, Identity, Invalid, Layout, PromptSettings
from batchrun.config import RunConfig
from batchrun.errors import StoppedEarly
from batchrun.inputs import BadRow, Batch, Carried, ColumnTypes, InputFile, RepeatedIds, Row, Rows
from batchrun.journal import Held, Journal, Survey
from batchrun.outputs import InvalidRow, Slice
from batchrun.types import NO_USAGE, Outcome, Request
from batchrun.words import count, verb

# The slot of a row that cannot become a request.
INVALID = 0xFFFFFFFF


# A batch for the feed: large enough that handing over costs nothing, small enough to flow.
BATCH_ROWS = 256


BATCH_BYTES = 4 * 2**20


MAX_NAMED_MODELS = 3


MAX_NAMED_COLUMNS = 5


CheckStop = Callable[[], None]


@dataclass(slots=True)
class Source:
    """One input file and how its rows become requests."""

    file: InputFile
    layout: Layout
    builder: Builder
    rows: int = 0
    invalid: int = 0


@dataclass(slots=True)
class Counts:
    """What the rows of the input are, before anything is sent."""

    total: int = 0
    held_ok: int = 0
    held_failed: int = 0  # settled failures that stay
    retried: int = 0  # failed before, sent again
    new: int = 0
    invalid: int = 0
    repeats: int = 0
    model_replaced: int = 0
    models_replaced: set[str] = field(default_factory=set)
    params_replaced: Counter[str] = field(default_factory=Counter)

    @property
    def to_send(self) -> int:
        return self.retried + self.new


@dataclass(slots=True)
class Plan:
    sources: list[Source]
    slots: array[int]
    counts: Counts
    carried: Carried
    models: set[str] = field(default_factory=set)  # at most two: one or several is what matters
    notes: list[str] = field(default_factory=list)  # on the table, for the start lines


def settings_of(config: RunConfig, *, stream_usage: bool, model: str | None) -> PromptSettings:
    """What the user asked of every body. ``model`` fills in where a row names none."""
    return PromptSettings(
        model=model,
        model_replaces=config.model_replaces,
        system=config.system,
        params=config.params,
        params_replacing=config.params_replacing,
        stream=config.stream,
        stream_usage=stream_usage,
        prompt_column=config.prompt_column,
        body_columns=config.body_columns,
    )


def lay_out(
    files: Sequence[InputFile], settings: PromptSettings, config: RunConfig, api: Api = CHAT
) -> list[Source]:
    """Decide each file's shape from its schema or its first good rows."""
    sources = []
    for file in files:
        columns, rows = inputs.head(file)
        layout = api.detect(columns, rows, settings, config.shape, file.name)
        sources.append(Source(file, layout, api.builder(layout, settings)))
    return sources


def shapes(sources: Sequence[Source]) -> tuple[str, str | None]:
    """The shape and prompt column that bind a rerun; several shapes are joined in order."""
    kinds = sorted({source.layout.shape for source in sources})
    columns = sorted({s.layout.prompt_column for s in sources if s.layout.prompt_column})
    return ",".join(kinds), ",".join(columns) or None


def needed(source: Source) -> Collection[str] | None:
    return source.layout.columns_needed


def never_stop() -> None:
    """The check of a pass that nobody interrupts."""


def make_plan(
    sources: list[Source], config: RunConfig, journal: Journal, check_stop: CheckStop
) -> Plan:
    """Read every row once and find out what the journal holds for it.

    ``check_stop`` is called once a batch and raises to end the pass.
    """
    types = ColumnTypes(config.carry, outputs.NAMES)
    plan = Plan(sources, array("I"), Counts(), types.carried())
    ids = RepeatedIds()
    journal.begin_pass()
    for source, batch in batches(sources, config.limit, check_stop, observe=types.observe):
        ids.add(batch.rows)
        plan.slots.extend(_claim(plan, source, batch.rows, journal, config))
    plan.carried = types.carried()
    plan.notes = notes(sources, plan.carried, ids)
    check_unchanged(sources)
    return plan


def notes(sources: Sequence[Source], carried: Carried, ids: RepeatedIds) -> list[str]:
    """What a user may not expect of a table, in words."""
    said = []
    if any(_has_id_only(source.layout) for source in sources):
        said.append('column "id" is only carried; name it custom_id to find rows by it')
    if carried.as_text:
        shown = ", ".join(carried.as_text[:MAX_NAMED_COLUMNS])
        more = len(carried.as_text) - MAX_NAMED_COLUMNS
        others = f" and {more:,} more" if more > 0 else ""
        said.append(f"carried as JSON text (nested, mixed or over-large values): {shown}{others}")
    if (repeated := ids.found()) is not None:
        rows, first, again = repeated
        who = f"{count(rows, 'row')} {verb(rows, 'have')}"
        said.append(f"{who} the custom_id of an earlier row, such as rows {first:,} and {again:,}")
    return said


def _has_id_only(layout: Layout) -> bool:
    return "id" in layout.carried_only and chat.CUSTOM_ID not in (layout.columns_needed or ())


def _claim(
    plan: Plan, source: Source, rows: Rows, journal: Journal, config: RunConfig
) -> Sequence[int]:
    """The slots of a batch's rows, all counted."""
    identify = source.builder.identify
    found = [_invalid_of(row) if isinstance(row, BadRow) else identify(row) for row in rows]
    valid = [each for each in found if type(each) is Identity]
    claimed = journal.claim_all([each.hash for each in valid])
    _count(plan.counts, journal.survey(claimed), config)
    plan.counts.total += len(rows)
    plan.counts.invalid += len(rows) - len(valid)
    source.rows += len(rows)
    source.invalid += len(rows) - len(valid)
    if _may_replace(source.layout, config):
        for each, row in zip(found, rows, strict=True):
            if type(each) is Identity:
                _count_replaced(plan.counts, source.layout, row, config)
    if len(plan.models) < 2:
        plan.models |= {each.model for each in valid}
    if len(valid) == len(rows):
        return claimed
    slots = iter(claimed)
    return [next(slots) if type(each) is Identity else INVALID for each in found]


def _count(counts: Counts, survey: Survey, config: RunConfig) -> None:
    rejected = survey.held[Held.REJECTED]
    counts.held_ok += survey.held[Held.OK]
    counts.new += survey.held[Held.NEW]
    counts.held_failed += 0 if config.retry_failed else rejected
    counts.retried += survey.held[Held.PASSING] + (rejected if config.retry_failed else 0)
    counts.repeats += survey.repeats


def count_held(plan: Plan, journal: Journal, config: RunConfig) -> None:
    """Count anew what the journal holds for the rows, after it has come to hold more."""
    counts = plan.counts
    counts.held_ok = counts.held_failed = counts.retried = counts.new = counts.repeats = 0
    for first in range(0, len(plan.slots), BATCH_ROWS):
        slots = [slot for slot in plan.slots[first : first + BATCH_ROWS] if slot != INVALID]
        _count(counts, journal.survey(slots), config)


def identified(builder: Builder, row: Row | BadRow) -> Built | Invalid:
    return _invalid_of(row) if isinstance(row, BadRow) else builder.build(row)


def _invalid_of(row: BadRow) -> Invalid:
    return Invalid(row.code, row.reason)


def _may_replace(layout: Layout, config: RunConfig) -> bool:
    """Whether the command line can say otherwise than a row does; a prompt alone says nothing."""
    says_more = layout.shape != "prompt" or "model" in layout.sent
    return says_more and bool(config.model_replaces or config.params_replacing)


def _count_replaced(counts: Counts, layout: Layout, row: Row | BadRow, config: RunConfig) -> None:
    """Count what the command line says otherwise than the row does."""
    fields = row.get("body") if layout.shape == "batch" and isinstance(row, dict) else row
    if not isinstance(fields, dict):
        return
    model = fields.get("model") if "model" in layout.sent or layout.shape == "batch" else None
    if config.model_replaces and isinstance(model, str) and model != config.model:
        counts.model_replaced += 1
        if len(counts.models_replaced) < MAX_NAMED_MODELS:
            counts.models_replaced.add(model)
    if layout.shape == "prompt":
        return
    for name in config.params_replacing:
        own = fields.get(name)
        if own is not None and own != config.params[name]:
            counts.params_replaced[name] += 1


def give_up_doubtful(plan: Plan, journal: Journal, max_in_doubt: int) -> int:
    """Settle the rows whose attempts of earlier runs may have been billed too often; how many.

    They keep the code of their last failure, and only --retry-failed sends them again.
    """
    if not journal.attempts_in_doubt:
        return 0
    given_up = 0
    for slot in plan.slots:
        if slot == INVALID or journal.in_doubt(slot) <= max_in_doubt:
            continue
        held = journal.held(slot)
        if held is Held.NEW:
            journal.settled(slot, _unanswered(journal, slot))
            plan.counts.new -= 1
        elif held is Held.PASSING:
            last = msgspec.structs.replace(
                journal.read(slot), final=True, in_doubt=journal.in_doubt(slot)
            )
            journal.settled(slot, last)
            plan.counts.retried -= 1
        else:
            continue
        given_up += 1
    plan.counts.held_failed += given_up
    journal.flush()
    return given_up


def _unanswered(journal: Journal, slot: int) -> Outcome:
    attempts = journal.in_doubt(slot)
    return Outcome(
        hash=journal.hash(slot),
        occurrence=journal.occurrence(slot),
        kind="transient",
        final=True,
        attempts=attempts,
        in_doubt=attempts,
        http_status=None,
        code="interrupted",
        message=f"{count(attempts, 'attempt')} {verb(attempts, 'were')} cut off;"
        " each may have been billed",
        request_id="",
        model="",
        latency_s=None,
        ttft_s=None,
        finished_at_ms=int(time.time() * 1000),
        usage=NO_USAGE,
        body=b"",
    )


def to_send(config: RunConfig) -> Collection[Held]:
    """Failures that pass are tried by every rerun, final ones only by --retry-failed."""
    return {Held.NEW, Held.PASSING, *([Held.REJECTED] if config.retry_failed else [])}


def requests(plan: Plan, journal: Journal, config: RunConfig) -> Iterator[list[Request]]:
    """The second pass: the requests of the rows still to be sent, in order, in batches.

    A row that is not what the plan saw ends the run: the input changed while it was read.
    """
    batch: list[Request] = []
    size_bytes = 0
    for request in _pending(plan, journal, config):
        batch.append(request)
        size_bytes += len(request.body)
        if len(batch) >= BATCH_ROWS or size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
    check_unchanged(plan.sources)


def _pending(plan: Plan, journal: Journal, config: RunConfig) -> Iterator[Request]:
    row_number = 0
    held = to_send(config)
    for source, batch in batches(plan.sources, config.limit):
        first, row_number = row_number, row_number + len(batch)
        slots = plan.slots[first:row_number]
        for index in _places(slots, held, journal):
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
    row_number = 0
    reading = batches(
        plan.sources, config.limit, check_stop, columns=_identifying, carried=plan.carried
    )
    for source, batch in reading:
        first, row_number = row_number, row_number + len(batch)
        if row_number > len(plan.slots):
            raise changed(source.file)
        slots = plan.slots[first:row_number]
        custom_ids = _custom_ids(batch.rows, first + 1)
        outcomes = _outcomes(source, batch, slots, journal)
        yield Slice(batch.carried, custom_ids, Places(source.file.name, batch.lines), outcomes)
    check_unchanged(plan.sources)


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


def _identifying(source: Source) -> Collection[str] | None:
    # Why a row is invalid is found out again: reasons for 10,000,000 bad rows are not kept.
    return source.layout.columns_needed if source.invalid else (chat.CUSTOM_ID,)


def _custom_ids(rows: Rows, first: int) -> list[str]:
    """A row's own id, or else its number."""
    custom_ids = list(map(str, range(first, first + len(rows))))
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


def check_unchanged(sources: Sequence[Source]) -> None:
    """StoppedEarly when a file is no longer the one this run began to read."""
    for source in sources:
        if not inputs.unchanged(source.file):
            raise changed(source.file)


def changed(file: InputFile) -> StoppedEarly:
    return StoppedEarly(f"{file.name} changed while it was read; nothing was published")


def batches(
    sources: Sequence[Source],
    limit: int | None,
    check_stop: CheckStop = never_stop,
    *,
    columns: Callable[[Source], Collection[str] | None] = needed,
    carried: Carried | None = None,
    observe: Callable[[InputFile, Batch], None] | None = None,
) -> Iterator[tuple[Source, Batch]]:
    """Every source's batches up to ``limit`` rows in all; StoppedEarly for a changed file."""
    left = limit
    for source in sources:
        for batch in _read(source, columns(source), carried):
            check_stop()
            # Whole, for publishing converts whole batches too, whatever the limit.
            if observe is not None:
                observe(source.file, batch)
            if left is not None:
                batch = _first(batch, left)
                left -= len(batch)
            if len(batch):
                yield source, batch
            if left == 0:
                return


def _read(
    source: Source, columns: Collection[str] | None, carried: Carried | None
) -> Iterator[Batch]:
    check_unchanged((source,))
    try:
        yield from inputs.read(source.file, columns=columns, carry=carried)
    except Exception:
        # Half of a file that is being written reads as anything: its change is what went wrong.
        check_unchanged((source,))
        raise


def _first(batch: Batch, rows: int) -> Batch:
    if len(batch) <= rows:
        return batch
    carried = batch.carried.slice(0, rows) if batch.carried is not None else None
    return Batch(batch.lines[:rows], batch.rows[:rows], carried)

"""Which rows still need an answer: one pass over the whole input before anything is sent.

The pass builds every row's request, hashes it and claims its place in the journal's index, so that
the start lines tell the truth, the bar has a total, and the later passes (sending, publishing) find
a row's answer without hashing again. Per row it keeps four bytes here and those of the index.
"""

from __future__ import annotations

import shutil
import time
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import add
from pathlib import Path
from typing import NamedTuple

import msgspec

from batchrun import chat, outputs
from batchrun.chat import Identity, Layout
from batchrun.config import RunConfig, default_output
from batchrun.errors import UsageError
from batchrun.inputs import SAMPLE, BadRow, Carried, ColumnTypes, RepeatedIds, Row, Rows
from batchrun.journal import Held, Journal, Survey
from batchrun.runs.asking import answer_schema
from batchrun.runs.copies import COPY, Copies, find_copies
from batchrun.runs.opening import Begun, Opened
from batchrun.runs.other_parts import take_over
from batchrun.runs.reuse import reuse
from batchrun.runs.sources import (
    EVERY_ROW,
    CheckStop,
    Chosen,
    Source,
    batches,
    check_unchanged,
    choose,
    invalid_of,
)
from batchrun.runs.unused import Unused
from batchrun.sending import Delivered, RunTally
from batchrun.summary import RowCounts
from batchrun.types import NO_USAGE, Outcome
from batchrun.words import count, size, verb

# An answer of some 100 words with its usage; once in the journal and once in the output.
USUAL_ANSWER_BYTES = 1_000
# The slot of a row that cannot become a request.
INVALID = 0xFFFFFFFF
# A batch for the feed: large enough that handing over costs nothing, small enough to flow.
BATCH_ROWS = 256
FAILED = (Held.REJECTED, Held.PASSING)
MAX_NAMED_MODELS = 3
MAX_NAMED_COLUMNS = 5


class Copied(NamedTuple):
    """Copies of rows that are settled."""

    ok: int = 0
    failed: int = 0  # for good
    passing: int = 0  # every rerun tries those rows again


NOT_COPIED = Copied()


@dataclass(slots=True)
class Counts:
    """What the rows of the input are, before anything is sent."""

    rows_of: Counter[Source] = field(default_factory=Counter)
    invalid_of: Counter[Source] = field(default_factory=Counter)
    held_ok: int = 0
    held_failed: int = 0  # settled failures that stay
    retried: int = 0  # failed before, sent again
    new: int = 0
    repeats: int = 0
    copies: int = 0  # rows that take the answer of an equal one
    copied: Copied = NOT_COPIED  # of those: what was held
    model_replaced: int = 0
    models_replaced: set[str] = field(default_factory=set)
    params_replaced: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.rows_of.total()

    @property
    def invalid(self) -> int:
        return self.invalid_of.total()

    @property
    def to_send(self) -> int:
        return self.retried + self.new

    @property
    def settled(self) -> int:
        """Rows answered or failed for good before anything is sent, but for invalid ones."""
        return self.held_ok + self.held_failed + sum(self.copied)

    @property
    def following(self) -> int:
        """Rows whose answer comes with that of another one."""
        return self.copies - sum(self.copied)

    def rows(self, delivered: Delivered | None = None, copied: Copied | None = None) -> RowCounts:
        """The rows as they stand after sending; the output itself knows more of them.

        ``copied`` is what is held for copies by then.
        """
        copied = copied or self.copied
        ok, failed = self.held_ok + copied.ok, self.held_failed + self.invalid
        failed += copied.failed + copied.passing
        sent = delivered.tally if delivered else RunTally()
        failed -= delivered.reopened if delivered else 0
        passing = sum(cause.rows for cause in sent.errors if cause.retried_on_rerun)
        passing += copied.passing
        return RowCounts(
            total=self.total,
            ok=ok + sent.ok,
            error=failed + sent.failed,
            # Those that failed alike and are pending again fail no more.
            passing=min(passing, failed + sent.failed),
            pending=self.total - ok - failed - sent.done,
            reused=self.settled,
            truncated=sent.truncated,
            filtered=sent.filtered,
            empty=sent.empty,
            duplicate=self.repeats,
            copied=self.copies,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What each row of the input is to the journal, and what the table is made of."""

    sources: Sequence[Source]
    slots: array[int]
    counts: Counts
    carried: Carried
    models: frozenset[str]  # at most a few: one or several is what matters
    notes: tuple[str, ...]  # on the table, for the start lines
    warnings: tuple[str, ...] = ()  # also for the end
    taken_back: int = 0  # answers that had been set aside
    chosen: Chosen = EVERY_ROW
    copies: Copies | None = None  # None: every row has its own answer

    def copied(self, journal: Journal, failures: Collection[Held] = FAILED) -> Copied:
        """What is held for copies now, of failures those."""
        held = [0] * len(Held)
        for slots in self._slots(copies=True):
            held = list(map(add, held, journal.survey(slots).held))
        rejected, passing = (
            held[each] if each in failures else 0 for each in (Held.REJECTED, Held.PASSING)
        )
        return Copied(held[Held.OK], rejected, passing)

    def own_slots(self) -> Iterator[list[int]]:
        """The slots of valid rows that are no copies, not many at once."""
        return self._slots(copies=False)

    def _slots(self, *, copies: bool) -> Iterator[list[int]]:
        if copies and self.copies is None:
            return
        for first in range(0, len(self.slots), BATCH_ROWS):
            slots = self.slots[first : first + BATCH_ROWS]
            if self.copies is None:
                yield [slot for slot in slots if slot != INVALID]
                continue
            marks = self.copies.marks(first, first + BATCH_ROWS)
            yield [
                slot
                for slot, mark in zip(slots, marks, strict=True)
                if slot != INVALID and (mark == COPY) is copies
            ]


def make_plan(
    sources: Sequence[Source], config: RunConfig, journal: Journal, check_stop: CheckStop
) -> Plan:
    """Read every row once and find out what the journal holds for it.

    ``check_stop`` is called once a batch and raises to end the pass.
    """
    chosen = choose(sources, config, check_stop)
    types, ids = ColumnTypes(config.carry, taken_names(config)), RepeatedIds()
    slots, counts, models = array("I"), Counts(), set[str]()
    journal.begin_pass()
    for source, batch in batches(sources, chosen, check_stop, observe=types.observe):
        ids.add(batch.rows[:: chosen.samples])
        slots.extend(_claim(counts, models, source, batch.rows, journal, config))
    carried = types.carried()
    check_unchanged(sources)
    said = tuple(notes(sources, carried, ids))
    return Plan(sources, slots, counts, carried, frozenset(models), said, chosen=chosen)


def taken_names(config: RunConfig) -> tuple[str, ...]:
    """Columns of the output that are not the input's."""
    taken = outputs.names(answer_schema(config), dedupe=config.dedupe)
    return taken if config.samples == 1 else (*taken, SAMPLE)


def plan_run(begun: Begun, sources: Sequence[Source], opened: Opened) -> Plan:
    """The plan of a run that sends: answers set aside come back, doubtful rows are given up.

    UsageError for a run that would leave out answers, or that has no model to ask.
    """
    config, book, check_stop = begun.config, opened.book, begun.stop.check
    plan = make_plan(sources, config, book, check_stop)
    taken_back = reused = 0
    if plan.counts.to_send:
        unused = Unused.of(config, begun.state, synthetic=config.mock)
        taken_back = unused.take_back(book, check_stop)
        reused = take_over(config, sources, plan.chosen, book, check_stop)
        reused += reuse(config, book, check_stop)
    plan = with_copies(plan, book, config)
    book.forget_passes()
    given_up = 0 if config.retry_failed else _give_up_doubtful(plan, book, config)
    if taken_back or reused or given_up or plan.copies is not None:
        _count_held(plan, book, config)
    _check_limit(config, book)
    _check_model(plan.models)
    said = plan.notes
    if reused:
        said += (f"{count(reused, 'answer')} {verb(reused, 'are')} reused from other outputs",)
    warnings = tuple(_warnings(begun, opened, plan))
    return replace(plan, taken_back=taken_back, notes=said, warnings=warnings)


def with_copies(plan: Plan, book: Journal, config: RunConfig) -> Plan:
    """With ``--dedupe``: rows that ask the same share the slot of the first one."""
    if not config.dedupe:
        return plan
    return replace(plan, copies=find_copies(plan.slots, INVALID, book, config))


def _check_limit(config: RunConfig, book: Journal) -> None:
    held = book.answers + book.count(Held.PASSING)
    flag, rows = "--limit", config.limit
    if config.sample is not None:
        flag, rows = "--sample", config.sample
    if rows is not None and held > rows * config.samples:
        raise UsageError(
            f"{flag} {rows} would leave out answers of {config.output}, which holds {held:,}",
            next_steps=("-o trial.parquet    for a trial beside it",),
        )


def _check_model(models: Collection[str]) -> None:
    if models == {""}:
        raise UsageError(
            "no model: neither --model nor any row names one, and this endpoint has no default",
            next_steps=("-m MODEL            `batchrun models` lists what it offers",),
        )


def _warnings(begun: Begun, opened: Opened, plan: Plan) -> Iterator[str]:
    config, state = begun.config, begun.state.path
    if (twin := _twin(config, opened.inputs_before)) is not None:
        yield (
            f"{config.output} was made from {twin}, and is now made from"
            f" {config.inputs[0]}; name another output with -o to keep both"
        )
    carried_bytes = sum(source.file.size_bytes for source in plan.sources)
    needed = plan.counts.to_send * 2 * USUAL_ANSWER_BYTES + carried_bytes
    with suppress(OSError):
        if (free := shutil.disk_usage(state).free) < needed:
            yield (
                f"{state.parent.absolute()} has {size(free)} free; journal and"
                f" output may need about {size(needed)}"
            )


def _twin(config: RunConfig, before: Sequence[str]) -> str | None:
    """The other input behind this output, when both have it for want of a name with ``-o``."""
    if len(before) != 1 or len(config.inputs) != 1 or config.to_stdout:
        return None
    old, new = Path(before[0]).name, Path(config.inputs[0]).name
    with suppress(UsageError):
        names = {default_output((each,), mock=config.mock) for each in (old, new)}
        if old != new and names == {Path(config.output).name}:
            return old
    return None


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
    counts: Counts,
    models: set[str],
    source: Source,
    rows: Rows,
    journal: Journal,
    config: RunConfig,
) -> Sequence[int]:
    """The slots of a batch's rows, all counted."""
    identify = source.builder.identify
    found = [invalid_of(row) if isinstance(row, BadRow) else identify(row) for row in rows]
    valid = [each for each in found if type(each) is Identity]
    claimed = journal.claim_all([each.hash for each in valid])
    _count(counts, journal.survey(claimed), config)
    counts.rows_of[source] += len(rows)
    counts.invalid_of[source] += len(rows) - len(valid)
    if _may_replace(source.layout, config):
        for each, row in zip(found, rows, strict=True):
            if type(each) is Identity:
                _count_replaced(counts, source.layout, row, config)
    if len(models) < 2:
        models |= {each.model for each in valid}
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


def _count_held(plan: Plan, journal: Journal, config: RunConfig) -> None:
    """Count anew what the journal holds for the rows, after it has come to hold more."""
    counts = plan.counts
    counts.held_ok = counts.held_failed = counts.retried = counts.new = counts.repeats = 0
    for slots in plan.own_slots():
        _count(counts, journal.survey(slots), config)
    if plan.copies is not None:
        counts.copies = plan.copies.rows
        counts.repeats += counts.copies
        counts.copied = plan.copied(journal, () if config.retry_failed else (Held.REJECTED,))


def _may_replace(layout: Layout, config: RunConfig) -> bool:
    """Whether the command line can say otherwise than a row does; a prompt alone says nothing."""
    says_more = layout.shape not in ("prompt", "template") or "model" in layout.sent
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
    if layout.shape in ("prompt", "template"):
        return
    for name in config.params_replacing:
        own = fields.get(name)
        if own is not None and own != config.params[name]:
            counts.params_replaced[name] += 1


def _give_up_doubtful(plan: Plan, journal: Journal, config: RunConfig) -> int:
    """Settle the rows whose attempts of earlier runs may have been billed too often; how many.

    They keep the code of their last failure, and only --retry-failed sends them again.
    """
    given_up = 0
    for slot in plan.slots if journal.attempts_in_doubt else ():
        if slot == INVALID or journal.in_doubt(slot) <= config.max_in_doubt_retries:
            continue
        held = journal.held(slot)
        if held is Held.NEW:
            outcome = _unanswered(journal, slot)
        elif held is Held.PASSING:
            in_doubt = journal.in_doubt(slot)
            outcome = msgspec.structs.replace(journal.read(slot), final=True, in_doubt=in_doubt)
        else:
            continue
        journal.settled(slot, outcome)
        given_up += 1
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

"""What is pending goes to the endpoint, while a second process may look on."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import NamedTuple

from batchrun import console, process, sending
from batchrun.config import RunConfig
from batchrun.console import Snapshot
from batchrun.errors import BatchrunError
from batchrun.journal import save_config, write_series, write_status
from batchrun.runs import passes
from batchrun.runs.asking import endpoint_to_send, model_of, models, wanted_room
from batchrun.runs.facts import start_facts, status_of
from batchrun.runs.opening import Begun, Found, Opened
from batchrun.runs.plan import Plan
from batchrun.sending import Budget, Delivered, Job, Totals
from batchrun.series import Recorder, Series
from batchrun.summary import RunSummary, ThisRun
from batchrun.types import Bound
from batchrun.words import count, verb

OFFER_S = 5.0
SERIES_S = 10.0
SHOWN_MODELS = 5


class Sent(NamedTuple):
    """What sending amounted to, and how long it took."""

    delivered: Delivered
    sending_s: float  # from the first request to the last answer
    series: Series  # of all runs so far
    notes: tuple[str, ...]

    @property
    def this_run(self) -> ThisRun:
        tally = self.delivered.tally
        return ThisRun(
            rows_sent=tally.done,
            attempts=tally.attempts,
            retries=tally.retries,
            rate_limited=tally.rate_limited,
            in_doubt=tally.in_doubt,
            cut_off=tally.cut_off,
            sending_s=round(self.sending_s, 3),
            tokens=tally.tokens,
            bound_by=self.delivered.bound_by,
        )


def say_start(begun: Begun, found: Found, opened: Opened, plan: Plan) -> None:
    """The first block, and the bar."""
    facts, counts = start_facts(begun, found, opened, plan), plan.counts
    begun.talk.print_block(console.start_block(facts), console.start_lines(facts))
    total = counts.total - counts.following
    begun.talk.begin(total, total - counts.to_send, timeout_s=begun.config.timeout_s)


async def send(
    begun: Begun, opened: Opened, plan: Plan, budget: Budget | None, so_far: Series
) -> Sent:
    """Send until every pending row is settled or something ends the run: ``delivered.cause``."""
    config, state, started_s = begun.config, begun.state, time.monotonic()
    rows = plan.counts.rows()
    # A row that takes another one's answer is not waited for.
    before = Totals(plan.counts.total - plan.counts.following, rows.ok, rows.error)
    requests = passes.requests(plan, opened.book, config)
    job = Job(config, requests, len(plan.models) < 2, before, budget, plan.counts.to_send)
    save_config(state, config, model_of(config), hosts_of(config, opened))
    recorder = Recorder(so_far, time.time(), before.ok, before.failed)
    saved_s = started_s

    def write(snapshot: Snapshot, bound_by: Bound) -> None:
        """Called about once a second in the thread that syncs; read by ``batchrun status``."""
        nonlocal saved_s
        recorder.see(
            time.time(),
            ok=snapshot.ok,
            failed=snapshot.failed,
            refused=snapshot.rate_limited,
            in_flight=snapshot.in_flight,
            bound=bound_by,
        )
        if time.monotonic() - saved_s >= SERIES_S:
            saved_s = time.monotonic()
            write_series(state, recorder.series)
        status = status_of(begun, before.total, snapshot.ok, snapshot.failed)
        elapsed_s = max(time.monotonic() - started_s, 1e-3)
        sent = snapshot.ok + snapshot.failed - before.ok - before.failed
        status.rows_per_s = sent / elapsed_s
        status.in_flight = snapshot.in_flight
        status.bound_by = bound_by
        write_status(state, status)
        if begun.metrics is not None:
            begun.metrics.write(snapshot)

    # What an earlier run left here must not speak for this one.
    write_status(state, status_of(begun, *before))
    with process.patient_collector():
        async with endpoint_to_send(config, begun.stop) as endpoint:
            notes = _notes_on(endpoint.room, config)
            for note in notes:
                begun.talk.note(note)
            delivered = await sending.deliver(
                job,
                endpoint,
                opened.book,
                begun.stop,
                begun.talk,
                write,
                begun.telemetry.told if begun.telemetry is not None else None,
            )
            sending_s = time.monotonic() - started_s
            tally = delivered.tally
            recorder.see(
                time.time(),
                ok=before.ok + tally.ok,
                failed=before.failed + tally.failed,
                refused=tally.rate_limited,
                in_flight=0,
                bound=delivered.bound_by,
            )
            write_series(state, recorder.series)
            if delivered.wrong_model:
                await _add_offer(delivered, config)
    lost = plan.counts.to_send - delivered.tally.done
    if lost and delivered.cause is None:
        # A bug, and one that must not become a file with rows missing.
        raise RuntimeError(f"{count(lost, 'row')} {verb(lost, 'were')} neither answered nor failed")
    return Sent(delivered, sending_s, recorder.series, (*notes, *delivered.notes))


def say_stopped(begun: Begun, summary: RunSummary) -> None:
    """Leave for ``batchrun status`` why this run, whose rows were counted, ended early."""
    rows = summary.rows
    if rows.total is not None:
        status = status_of(begun, rows.total, rows.ok, rows.error)
        status.state, status.exit_code, status.reason = "stopped", summary.exit_code, summary.reason
        write_status(begun.state, status)


def hosts_of(config: RunConfig, opened: Opened) -> list[str]:
    """All that gave answers held here, or are about to."""
    return list(dict.fromkeys([*opened.hosts_before, config.endpoint.host]))


def _notes_on(room: int, config: RunConfig) -> tuple[str, ...]:
    if room >= wanted_room(config):
        return ()
    return (f"at most {count(room, 'request')} in flight, for want of open files (ulimit -n)",)


async def _add_offer(delivered: Delivered, config: RunConfig) -> None:
    """Add what the endpoint offers to the advice about a model it does not have."""
    cause = delivered.cause
    assert cause is not None
    with suppress(BatchrunError, TimeoutError):
        async with asyncio.timeout(OFFER_S):
            offered = await models(config)
        if offered:
            names = ", ".join(offered[:SHOWN_MODELS])
            more = f" and {len(offered) - SHOWN_MODELS:,} more" if offered[SHOWN_MODELS:] else ""
            cause.next_steps = (f"add --model NAME; it offers: {names}{more}",)

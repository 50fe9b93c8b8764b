"""A whole run, from a RunConfig to a RunSummary. It reads like the README.

Rows that are answered are known before anything is sent; what is sent is journaled as it lands;
what is settled is published as one file; the published file is the memory of the next run. Every
early end takes the same way out: the Stop is set, the pool drains, the journal is made durable.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, closing
from functools import partial

from batchrun import process
from batchrun.config import RunConfig
from batchrun.console import Progress
from batchrun.errors import BatchrunError, UsageError
from batchrun.inputs import RowsOrTable
from batchrun.outputs import Footer
from batchrun.runs import asking, delivery, ending, objects, opening, pages, place, publishing
from batchrun.runs.ending import Phases
from batchrun.runs.metrics_file import MetricsFile
from batchrun.runs.opening import Begun, Found, Opened
from batchrun.runs.plan import plan_run
from batchrun.runs.spending import budget_of, check_price, count_before
from batchrun.runs.stop import Stop
from batchrun.runs.telemetry import Telemetry
from batchrun.summary import RunSummary


async def run(
    config: RunConfig,
    talk: Progress | None = None,
    *,
    handle_signals: bool = False,
    rows: RowsOrTable | None = None,
) -> RunSummary:
    """Do the whole job and say what it amounted to.

    Raises BatchrunError for what ends before the run began: usage, settings that differ, the lock,
    an input that cannot be read. Afterwards every end is a RunSummary with its exit code.
    ``handle_signals`` is for a process of our own: SIGINT, SIGTERM and SIGHUP then drain the run.
    ``rows`` are what the input ``-`` stands for, instead of stdin: dicts or an Arrow table.
    """
    talk = talk or Progress(quiet=True)
    work = partial(_run, talk=talk, handle_signals=handle_signals, rows=rows)
    if objects.is_remote(config):
        return await objects.run(config, talk, work)
    return await work(config)


async def _run(
    config: RunConfig, talk: Progress, *, handle_signals: bool, rows: RowsOrTable | None
) -> RunSummary:
    """On local files."""
    stop = Stop(talk)
    with ExitStack() as stack:
        if handle_signals:
            stack.enter_context(process.signals(stop.on_signal, stop.at_once, stop.last_words))
        asking.check_endpoint(config)
        asking.check_engine(config)
        pages.check_page(config)
        metrics = MetricsFile.of(config)
        place.check_output(config)
        telemetry = Telemetry.of(config)
        if config.deadline_s is not None:
            stack.enter_context(stop.at_deadline(config.deadline_s))
        lock = await place.hold(config, stop, talk, stack)
        try:
            begun = Begun.now(config, talk, stop, lock, metrics, telemetry)
            summary = await _begin(begun, rows)
        except BatchrunError as exc:
            if metrics is not None:
                metrics.end(RunSummary(exit_code=exc.exit_code))
            if telemetry is not None:
                await asyncio.to_thread(telemetry.end, RunSummary(exit_code=exc.exit_code))
            raise
        if metrics is not None:
            metrics.end(summary)
        if telemetry is not None:
            summary.notes += await asyncio.to_thread(telemetry.end, summary)
        return summary


async def _begin(begun: Begun, rows: RowsOrTable | None) -> RunSummary:
    opened = None
    try:
        begun = begun.with_price()
        check_price(begun.config)
        found = await asyncio.to_thread(opening.find, begun, rows)
        if not begun.state.has_journal() and (
            footer := await asyncio.to_thread(opening.current_output, begun.config, found)
        ):
            kept = await asyncio.to_thread(publishing.set_aside, begun, None)
            begun.lock.remove_state()
            note = await _paged(begun.config, footer)
            return ending.unchanged(begun, footer, kept, note)
        opened = opening.open_journal(begun, found)
        with closing(opened.book):
            return await _go_on(begun, found, opened)
    except BaseException as exc:
        # What ended before it began leaves nothing behind.
        began_nothing = opened and not opened.continues and isinstance(exc, UsageError)
        if began_nothing or not begun.state.has_journal():
            begun.lock.remove_state()
        raise


async def _go_on(begun: Begun, found: Found, opened: Opened) -> RunSummary:
    plan = sent = kept = backup = None
    try:
        await asyncio.to_thread(opening.take_over, begun, found, opened.book)
        plan = await asyncio.to_thread(plan_run, begun, found.sources, opened)
        budget = budget_of(begun.config)
        if budget is not None and plan.counts.to_send:
            await asyncio.to_thread(
                count_before, budget, begun.config, plan, opened.book, begun.stop.check
            )
        delivery.say_start(begun, found, opened, plan)
        old = found.old.target
        series = pages.series_before(begun.state, old and old.path)
        if plan.counts.to_send:
            sent = await delivery.send(begun, opened, plan, budget, series)
            if sent.delivered.cause is not None:
                raise sent.delivered.cause
        begun.stop.all_sent()
        kept = await asyncio.to_thread(publishing.set_aside, begun, opened.book)
        backup = await asyncio.to_thread(publishing.back_up, begun, found)
        footer = await asyncio.to_thread(publishing.publish, begun, found, opened, plan, series)
        published = await asyncio.to_thread(publishing.clear_up, begun, found, opened, plan, footer)
        published = published._replace(
            notes=(*published.notes, *await _paged(begun.config, footer))
        )
        return ending.finished(begun, published, Phases(opened, plan, sent, kept, backup))
    except BatchrunError as cause:
        if sent is None and isinstance(cause, UsageError):
            raise
        summary = ending.early(cause, begun, Phases(opened, plan, sent, kept, backup))
        delivery.say_stopped(begun, summary)
        return summary


async def _paged(config: RunConfig, footer: Footer) -> tuple[str, ...]:
    if config.report is None:
        return ()
    return (await asyncio.to_thread(pages.write_page, config, footer),)

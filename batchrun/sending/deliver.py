"""Send what is pending: the pool, the limits, the endpoint and the journal, working together.

The order of writes is the promise: a SENT record is in the journal before a request's first byte
leaves, an outcome is in the journal before it counts, and one write serves both (the outcome of a
worker's last row and the SENT of its next). fdatasync runs once a second in a thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from batchrun.config import RunConfig
from batchrun.console import Progress, Snapshot
from batchrun.endpoint import ChatEndpoint
from batchrun.errors import BatchrunError
from batchrun.journal import Journal
from batchrun.limits import Limits, LimitSettings
from batchrun.sending import patience
from batchrun.sending.classify import classify
from batchrun.sending.desk import Desk
from batchrun.sending.feed import Feed
from batchrun.sending.meter import Meter, Totals
from batchrun.sending.pool import Pool
from batchrun.sending.tally import RunTally
from batchrun.types import Bound, Request

TICK_S = 0.2


SYNC_S = 1.0


class Delivered(NamedTuple):
    """What sending amounted to; ``cause`` is what ended it early, None when nothing did."""

    cause: BatchrunError | None
    tally: RunTally
    bound_by: Bound
    reopened: int  # rows that failed alike and are pending again
    wrong_model: bool


class Watch(Protocol):
    """Asked about once a second with what a second process may want to know."""

    def __call__(self, snapshot: Snapshot, bound_by: Bound) -> None: ...


async def deliver(
    config: RunConfig,
    endpoint: ChatEndpoint,
    host: str,
    requests: Iterator[list[Request]],
    journal: Journal,
    before: Totals,
    talk: Progress,
    *,
    room: int,
    one_model: bool,
    on_pool: Callable[[Pool], None],
    watch: Watch,
) -> Delivered:
    """Send ``requests`` until they are settled or something ends the run.

    ``room`` is how many connections this process can open. ``on_pool`` is given the pool before
    anything is sent: whoever catches signals stops it.
    """
    limits = admission_for(config, host, room)
    limits.on_change = talk.detail
    desk = Desk(config, journal, host)
    feed = Feed()
    pool = Pool(
        feed=feed,
        send=endpoint.send,
        judge=classify,
        admission=limits,
        persistence=persistence_for(config),
        desk=desk,
        drain_s=config.drain_s,
        one_model=one_model,
    )
    desk.stop = pool.stop
    on_pool(pool)
    loop = asyncio.get_running_loop()

    meter = Meter(limits, feed, pool, desk.tally, before)
    with (
        ThreadPoolExecutor(1, "batchrun-read") as reader,
        ThreadPoolExecutor(1, "batchrun-sync") as syncer,
    ):
        reading = loop.run_in_executor(reader, _read_ahead, requests, feed, loop, pool)
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(watch_limits(limits, pool, lambda: talk.update(meter.sample()))),
                group.create_task(_keep_durable(journal, pool, syncer, meter, watch)),
            ]
            try:
                cause = await pool.run()
            finally:
                feed.close()
                for helper in helpers:
                    helper.cancel()
                await reading
    if cause is None or cause.exit_code != 74:
        desk.idle()
        await asyncio.to_thread(journal.sync)
    talk.update(meter.snapshot())
    return Delivered(cause, desk.tally, meter.bound_by(), desk.reopened, desk.wrong_model)


def admission_for(config: RunConfig, host: str, room: int) -> Limits:
    """``room`` is how many requests may be in flight at the very most."""
    settings = LimitSettings(
        concurrency=config.concurrency and min(config.concurrency, room),
        max_concurrency=room,
        rpm=config.rpm,
        tpm=config.tpm,
        max_wait_s=config.max_wait_s,
        max_outage_s=config.max_outage_s,
    )
    return Limits(settings, host=host)


def persistence_for(config: RunConfig) -> patience.Persistence:
    return patience.Persistence(
        max_retries=config.max_retries,
        max_in_doubt_retries=config.max_in_doubt_retries,
        max_wait_s=config.max_wait_s,
    )


def _read_ahead(
    requests: Iterator[list[Request]], feed: Feed, loop: asyncio.AbstractEventLoop, pool: Pool
) -> None:
    """The reader's thread: fill the feed until the input ends or nobody wants more."""
    error: BaseException | None = None
    try:
        for batch in requests:
            if not feed.put(batch):
                break
            loop.call_soon_threadsafe(pool.staff)
    except BaseException as exc:  # raised again by the pool, on the loop's thread
        error = exc
    feed.end(error)
    loop.call_soon_threadsafe(pool.staff)


async def watch_limits(
    limits: Limits, pool: Pool, each_tick: Callable[[], None] = lambda: None
) -> None:
    """Ask the limits five times a second whether going on is of use; runs until cancelled."""
    while True:
        await asyncio.sleep(TICK_S)
        verdict = limits.stop(time.monotonic())
        if verdict is not None and not pool.stopping:
            pool.stop(verdict)
        pool.staff()
        each_tick()


async def _keep_durable(
    journal: Journal, pool: Pool, syncer: ThreadPoolExecutor, meter: Meter, watch: Watch
) -> None:
    """One fdatasync a second at most: the answers a power loss may cost."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SYNC_S)
        try:
            if (sync := journal.begin_sync()) is not None:
                await loop.run_in_executor(syncer, sync)
                journal.end_sync()
        except BatchrunError as exc:
            pool.stop(exc, drain_s=0.0)
            return
        await loop.run_in_executor(syncer, watch, meter.snapshot(), meter.bound_by())
